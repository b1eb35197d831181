"""The LoRA family against its formulas, numpy and plain peft; a start from the weights leaves the base bit-equal."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same_answers, tiny_tree
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Callback, Layout, Loaded, Method
from tunewright.errors import MethodError, RecipeError
from tunewright.models import low_rank, tiny, vocabulary
from tunewright.models.layout import layout_of
from tunewright.recipe import Choice, Recipe, TrainSpec
from tunewright.runs import checking
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train

VARIANTS = {
    "rslora": {"use_rslora": True, "r": 4}, "dora": {"use_dora": True}, "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa", "r": 4},
    "olora": {"init_lora_weights": "olora", "r": 4}, "eva": {"init_lora_weights": "eva"},
    "lora+": {"loraplus_lr_ratio": 16.0}, "pissa, rslora": {"init_lora_weights": "pissa", "r": 4, "use_rslora": True},
}  # fmt: skip


def adapted(tiny_recipe, task="text-classification", **options):
    ready = checking.prepare(tiny_recipe(task, method={"name": "lora", **options}))
    task_object, loaded = checking.load(ready)
    torch.manual_seed(0)
    return ready, task_object, loaded, ready.method.apply(loaded.model, loaded).eval()


def query(model):
    return next(m for n, m in model.named_modules() if n.endswith("attention.self.query"))


def moved(model):
    """As after training: every trained number shifted a little."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("task", ["text-classification", "image-classification", "causal-lm"])
def test_every_variant_starts_at_the_base_moves_and_gives_the_base_as_reference(tiny_recipe, task, name):
    ready, task_object, loaded, _ = adapted(tiny_recipe, task, **VARIANTS[name])
    fresh = checking.load(ready)[1]
    batch = task_object.collate([task_object.encode(r, loaded) for r in ready.data.train[:3]])
    with torch.no_grad():
        before = task_object.predict(fresh.model.eval(), batch, fresh)
        fresh.model.requires_grad_(True)
        model = ready.method.apply(fresh.model, fresh).eval()
        steps = checking.planned_steps(ready, task_object, fresh)
        assert ready.method.start(model, task_object, fresh, steps.once_over()) is None
        same_answers(before, task_object.predict(model, batch, fresh), abs=1e-5)
        moved(model)
        with ready.method.reference(model, None) as base:
            assert task_object.predict(base, batch, fresh) == before, "bit-equal"
        assert task_object.predict(model, batch, fresh) != before


MERGED = [("text-classification", name) for name in VARIANTS] + [("image-classification", "dora")]


@pytest.mark.parametrize(("where", "name"), MERGED)
def test_every_variant_merges_saves_and_opens_with_plain_peft_on_the_untouched_base(tiny_recipe, tmp_path, where, name):
    import peft

    ready, task, loaded, model = adapted(tiny_recipe, where, **VARIANTS[name])
    moved(model)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:3]])
    plain = checking.load(ready)[1]
    ready.method.save(model, loaded, tmp_path)
    opened = peft.PeftModel.from_pretrained(plain.model, str(tmp_path)).eval()
    with torch.no_grad():
        own = task.predict(model, batch, loaded)
        same_answers(own, task.predict(opened, batch, plain), abs=1e-5)
        same_answers(own, task.predict(ready.method.merge(model).eval(), batch, loaded), abs=1e-5)
        assert own == task.predict(model, batch, loaded), "merging left the model alone"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_weights_that_are_stored_the_other_way_round_are_adapted_the_same(tmp_path, options):
    """GPT-2's Conv1D is (in, out): rows and columns must not be mixed up, which square matrices would hide."""
    import peft
    import transformers

    torch.manual_seed(0)
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40, "initializer_range": 0.2}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    plain, ids = copy.deepcopy(net), torch.arange(12).reshape(2, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        before = net(ids).logits
        model = build(r=3, **options).apply(net, Loaded(net, None, layout_of(net))).eval()
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
        moved(model)
        own, merged = model(ids).logits, build(**options).merge(model).eval()(ids).logits
        assert (own - before).abs().max() > 0.1
        torch.testing.assert_close(merged, own, atol=1e-5, rtol=1e-5)
        low_rank.save(model, Loaded(net, Silent(), layout_of(plain)), tmp_path)
        opened = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()(ids).logits
        torch.testing.assert_close(opened, own, atol=1e-5, rtol=1e-5)


class Silent:
    """A processor with nothing to save."""

    def save_pretrained(self, folder):
        pass


def test_rslora_divides_by_the_root_of_the_rank(tiny_recipe):
    _, _, _, model = adapted(tiny_recipe, r=4, lora_alpha=6, use_rslora=True)
    layer, x = query(model), torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6 / 4**0.5 * (x @ a.T @ b.T), atol=1e-5, rtol=1e-5)


def test_dora_is_magnitude_times_direction_of_each_row_and_holds_the_norm_still(tiny_recipe):
    """m (W + s B A) / |W + s B A|, rows by length; the gradient of B as if the length were a constant."""
    _, _, _, model = adapted(tiny_recipe, r=4, lora_alpha=8, use_dora=True)
    layer = query(model)
    moved(layer)
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    m, w = layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    direction = w + 2.0 * b @ a
    length = direction.norm(dim=1, keepdim=True)
    expected = x @ (m.unsqueeze(1) * direction / length.detach()).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    layer(x).square().sum().backward()
    theirs = b.grad.clone()
    b.grad = None
    expected.square().sum().backward()
    torch.testing.assert_close(theirs, b.grad, atol=1e-3, rtol=1e-3)


def test_c38_merged_dora_rows_have_the_trained_lengths(tiny_recipe):
    ready, _, _, model = adapted(tiny_recipe, use_dora=True)
    moved(model)
    lengths = query(model).lora_magnitude_vector["default"].weight.detach()
    torch.testing.assert_close(query(ready.method.merge(model)).weight.norm(dim=1), lengths.abs(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
def test_dora_leaves_out_what_has_no_length(tiny_recipe, task):
    """A pruned output is 0 all over: its length divided by itself made every loss NaN (seen in MobileNetV2)."""
    ready = checking.prepare(tiny_recipe(task, method="dora"))
    _, loaded = checking.load(ready)
    whole = ready.method.apply(copy.deepcopy(loaded.model), loaded)
    assert not any("no direction" in note for note in loaded.notes)
    name = sorted(n for n, m in whole.named_modules() if hasattr(m, "lora_A"))[0].removeprefix("base_model.model.")
    loaded.model.get_submodule(name).weight.data[1] = 0
    model = ready.method.apply(loaded.model, loaded)
    assert sum("DoRA leaves 1 of" in note and name in note for note in loaded.notes) == 1
    wrapped = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert name not in wrapped
    assert len(wrapped) == sum(hasattr(m, "lora_A") for m in whole.modules()) - 1


def test_pissa_begins_with_the_top_of_numpys_singular_values(tiny_recipe):
    _, _, _, model = adapted(tiny_recipe, r=3, init_lora_weights="pissa")
    layer = query(model)
    u, s, v = np.linalg.svd(layer.base_layer.weight.detach().numpy())
    top = (u[:, :3] * s[:3]) @ v[:3]
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    np.testing.assert_allclose(product.detach().numpy(), top, atol=1e-5)


def test_olora_begins_with_a_part_of_numpys_qr(tiny_recipe):
    _, _, _, model = adapted(tiny_recipe, r=3, init_lora_weights="olora")
    layer = query(model)
    q, upper = np.linalg.qr(layer.base_layer.weight.detach().numpy())
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    np.testing.assert_allclose(product.detach().numpy(), q[:, :3] @ upper[:3], atol=1e-5)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_rank_above_a_matrix_starts_at_the_base_and_is_saved(tiny_recipe, tmp_path, how):
    import peft

    ready, task, loaded, model = adapted(tiny_recipe, r=24, init_lora_weights=how)
    plain = checking.load(ready)[1]
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:3]])
    with torch.no_grad():
        same_answers(task.predict(plain.model.eval(), batch, plain), task.predict(model, batch, loaded), abs=1e-5)
        moved(model)
        ready.method.save(model, loaded, tmp_path)
        opened = peft.PeftModel.from_pretrained(plain.model, str(tmp_path)).eval()
        same_answers(task.predict(model, batch, loaded), task.predict(opened, batch, plain), abs=1e-5)


def test_eva_begins_with_the_main_directions_of_what_flows_in(tiny_recipe):
    """Right singular vectors of all inputs by numpy; padding, which is most of a short row, is none of them."""
    ready, task, loaded, model = adapted(tiny_recipe, r=3, init_lora_weights="eva")
    batches = list(checking.planned_steps(ready, task, loaded).once_over())
    inputs: list[torch.Tensor] = []
    handle = query(model).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    assert ready.method.start(model, task, loaded, batches) is None
    handle.remove()
    assert len(inputs) == len(batches) >= 3
    assert any((b["attention_mask"] == 0).any() for b in batches)
    seen = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(inputs, batches, strict=True)]).double().numpy()
    _, _, v = np.linalg.svd(seen, full_matrices=False)
    a = query(model).lora_A["default"].weight.detach().numpy()
    assert np.abs(np.abs((a * v[:3]).sum(1)) - 1).max() < 1e-4, "the same directions, up to their sign"
    assert not query(model).lora_B["default"].weight.any()


def test_what_a_start_does_is_said():
    said = {how: build(init_lora_weights=how).remarks() for how in ("default", "pissa", "eva")}
    assert said["default"] == []
    assert "rank 16, twice r" in said["pissa"][1]
    assert "inputs of every matrix" in said["eva"][0]
    assert "no dropout" in build(use_dora=True).remarks()[0]


def test_few_matrices_are_recommended_a_higher_rate():
    assert build().recommended()[0] == build(use_dora=True).recommended()[0] == 1e-3
    assert build(init_lora_weights="pissa").recommended()[0] == pytest.approx(3e-4)
    assert build(target_modules=["q_proj", "v_proj"]).recommended()[0] == 3e-3
    assert build(target_modules=["q_proj", "down_proj"]).recommended()[0] == 1e-3


def test_loraplus_is_recommended_rates_of_a_and_b_around_that_of_lora():
    rate, why = build(loraplus_lr_ratio=16.0).recommended()
    assert (rate, rate * 16) == (1e-3 / 4, 1e-3 * 4)
    assert why == "of A; B has 16 times it, around 0.001"


@pytest.mark.parametrize(("r", "scale"), [(8, 6 / 8**0.5), (32, 6 / 32**0.5)])
def test_rslora_has_the_scale_of_lora_at_rank_eight_and_falls_with_the_root(tiny_recipe, r, scale):
    _, _, _, model = adapted(tiny_recipe, r=r, use_rslora=True)
    assert query(model).scaling["default"] == pytest.approx(scale)


def build(**options) -> Method:
    return find.build("methods", "lora", options, Method)


@pytest.mark.parametrize("how", ["default", "pissa"])
def test_on_a_base_in_few_bits_a_start_is_the_base_and_merging_is_onto_what_the_bits_stand_for(tiny_recipe, how):
    pytest.importorskip("bitsandbytes")
    base = tiny_tree("causal-lm", Path(tempfile.mkdtemp()))["model"]
    keys = {"model": {"checkpoint": base, "quantize": "nf4"}, "method": {"name": "lora", "init_lora_weights": how}}
    ready = checking.prepare(tiny_recipe("causal-lm", **keys))
    task, loaded = checking.load(ready)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:3]])
    with torch.no_grad():
        before = task.predict(loaded.model.eval(), batch, loaded)
        model = ready.method.apply(loaded.model, loaded).eval()
        same_answers(before, task.predict(model, batch, loaded), abs=1e-4)
        moved(model)
        own = task.predict(model, batch, loaded)
        same_answers(own, task.predict(ready.method.merge(model).eval(), batch, loaded), abs=1e-3)


def test_loraplus_gives_b_its_own_rate(tiny_recipe):
    """Seen in one step of plain SGD: moved / gradient is the rate of each."""
    ready, task, loaded, model = adapted(tiny_recipe, loraplus_lr_ratio=16.0)
    for _, layer in low_rank.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, 0, 0.1)
    optimizer = torch.optim.SGD(ready.method.groups(model, loaded, 1e-3, 0.0))
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:4]])
    sum(task.loss(model, batch, loaded).totals.values()).backward()
    before = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    rates = {}
    for name, parameter in model.named_parameters():
        if name in before and before[name][1].abs().max() > 1e-6:
            old, gradient = before[name]
            place = gradient.abs().argmax()
            rates[name] = float(((old - parameter.detach()).flatten() / gradient.flatten())[place])
    assert {round(rate / 1e-3) for name, rate in rates.items() if ".lora_B." in name} == {16}
    assert {round(rate / 1e-3) for name, rate in rates.items() if ".lora_B." not in name} == {1}
    assert len(rates) > 10


def test_decay_never_shortens_doras_lengths(tiny_recipe):
    ready, _, loaded, model = adapted(tiny_recipe, "image-classification", use_dora=True)
    groups = ready.method.groups(model, loaded, 1e-3, 0.1)
    lengths = [g for g in groups if any("magnitude" in n for n, _ in g["params"])]
    assert lengths
    assert all(g["weight_decay"] == 0 for g in lengths)


@pytest.mark.parametrize("rank", [1, 6])
def test_full_rank_reaches_least_squares_and_rank_one_does_not(rank):
    """y = X W with six outputs: B A of rank six can be any change, rank one cannot."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(40, n, generator=generator) for n in (8, 6))
    net = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    best = torch.linalg.lstsq(x, target).solution
    floor = float((x @ best - target).square().mean())
    method = find.build("methods", "lora", {"r": rank}, Method)
    model = method.apply(net, Loaded(net, None, Layout((), None, None)))
    optimizer = torch.optim.LBFGS(
        [p for p in model.parameters() if p.requires_grad], max_iter=2000, line_search_fn="strong_wolfe"
    )

    def cost():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(cost)
    reached = float(cost())
    assert reached == pytest.approx(floor, rel=1e-3) if rank == 6 else reached > 1.1 * floor


class Pulled(Exception):
    pass


class Plug(Callback):
    def on_step(self, state, logs):
        if state.step == 5:
            raise Pulled


@pytest.mark.parametrize("name", ["dora", "pissa", "eva", "lora+"])
def test_every_variant_resumes_to_the_same_bytes(tiny_recipe, tmp_path, name):
    options = {"max_steps": 9, "save_steps": 2, "precision": "float32", "logging_steps": 1}
    recipe = tiny_recipe(method={"name": "lora", **VARIANTS[name]}, train=options)
    quiet = {"quiet": True, "say": lambda text: None}
    with pytest.raises(Pulled):
        train(recipe, tmp_path / "stopped", callbacks=[Plug()], **quiet)
    runs = [train(recipe, tmp_path / place, **quiet) for place in ("stopped", "straight")]
    one, two = (load_file(run.path / "model" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    "options",
    [{"loraplus_lr_ratio": 0.0}, {"init_lora_weights": "loftq"}, {"use_dora": True, "init_lora_weights": "pissa"}],
)
def test_impossible_combinations_are_refused(options):
    with pytest.raises(RecipeError):
        find.build("methods", "lora", options, Method)


def test_all_means_all_linear(tiny_recipe):
    counts = [len(low_rank.lora_layers(adapted(tiny_recipe, target_modules=word)[3])) for word in low_all()]
    assert counts[0] == counts[1] > 10


def low_all() -> tuple[str, ...]:
    from tunewright.methods.lora import ALL

    return ALL


# ------------------------------------------------------------ mixtures of experts
@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """`mixture(method=...)` -> a recipe for a two-layer Mixtral of four experts."""
    where = tmp_path_factory.mktemp("mixture")
    base = tiny.mixture(where / "base")
    tree = tiny_tree("causal-lm", where)
    assert tree["model"] == str(base)
    return lambda **keys: Recipe.of(tree | keys)[0]


@pytest.mark.parametrize("how", ["default", "pissa", "eva"])
def test_experts_and_attention_move_nothing_else_does_and_plain_peft_opens_it(mixture, tmp_path, how):
    import peft

    method = {"name": "lora", "init_lora_weights": how}
    recipe = mixture(method=method, train={"max_steps": 4, "learning_rate": 1e-2, "precision": "float32"})
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    ready = checking.prepare(recipe)
    task, base = checking.load(ready)
    opened = peft.PeftModel.from_pretrained(base.model, str(run.path / "model")).eval()
    predictor = open_run(run.path)
    batch = task.collate([task.encode(r, base) for r in ready.data.test[:2]])
    with torch.no_grad():
        own = task.predict(predictor.model, batch, predictor.loaded)
        same_answers(own, task.predict(opened, batch, base), abs=1e-5)
        merged = ready.method.merge(predictor.model).eval()
        same_answers(own, task.predict(merged, batch, base), abs=1e-5)
    clean = dict(checking.load(ready)[1].model.named_parameters())
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, clean[n])}
    kinds = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    wanted = {f"{kind}.weight" for kind in kinds} | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert changed == {f"model.layers.{i}.{name}" for i in (0, 1) for name in wanted}


@pytest.mark.parametrize("how", ["default", "eva"])
def test_what_happens_to_experts_is_noted(mixture, how):
    _, loaded = checking.load(checking.prepare(mixture()))
    build(init_lora_weights=how).apply(loaded.model, loaded)
    said = loaded.notes[-1]
    assert said.startswith("Experts are adapted too (down_proj, gate_up_proj; 4 fused weights, rank 8 for each expert)")
    assert "routes tokens to them stays frozen" in said
    assert ("eva does not reach them" in said) == (how == "eva")


def test_a_router_that_is_a_linear_layer_stays_frozen_unless_it_is_named():
    import transformers

    torch.manual_seed(0)
    config = transformers.PhimoeConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    for targets, reached in (("all-linear", 0), (["router"], 2)):
        net = transformers.PhimoeForCausalLM(config)
        model = build(target_modules=targets).apply(net, Loaded(net, None, layout_of(net)))
        names = [name for name, _ in low_rank.lora_layers(model)]
        assert sum("router" in name for name in names) == reached
        assert any("experts" in name for name in names) == (reached == 0)


def test_a_router_that_is_a_bare_weight_can_be_named(mixture):
    ready = checking.prepare(mixture(method={"name": "lora", "target_parameters": ["mlp.gate.weight"]}))
    _, loaded = checking.load(ready)
    model = ready.method.apply(loaded.model, loaded)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum(".mlp.gate." in n for n in trained) == 4
    assert not any("experts" in n for n in trained)


def test_experts_can_be_left_frozen_and_what_cannot_be_had_on_them_is_refused(mixture):
    ready = checking.prepare(mixture(method={"name": "lora", "target_parameters": []}))
    _, loaded = checking.load(ready)
    model = ready.method.apply(loaded.model, loaded)
    assert not any(p.requires_grad and "experts" in n for n, p in model.named_parameters())
    named = {"target_parameters": ["experts.down_proj"]}
    for options in ({"use_dora": True}, {"lora_dropout": 0.1}, {"use_dora": True} | named):
        _, loaded = checking.load(ready)
        with pytest.raises(MethodError, match=r"(use_dora|lora_dropout) cannot be had on the fused weights"):
            build(**options).apply(loaded.model, loaded)
    with pytest.raises(MethodError, match=r"gate_proj.*match no fused weight.*experts\.down_proj"):
        build(target_parameters=["experts.gate_proj"]).apply(loaded.model, loaded)


# ------------------------------------------------------------------------ new tokens
NEW = ("<tool>", "<end>")


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """`grown("causal-lm", tied)` -> a recipe whose tokenizer knows two tokens that the base lacks; rows contain one."""
    import transformers

    def make(task: str, tied: bool):
        where = tmp_path_factory.mktemp("grown")
        (where / "base").mkdir()
        config = {} if task == "text-classification" else {"tie_word_embeddings": tied}
        maker = tiny.text_encoder if task == "text-classification" else tiny.causal_lm
        maker(where / "base", **config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where / "base")
        assert tokenizer.add_tokens(list(NEW)) == 2
        tokenizer.save_pretrained(where / "base")
        tree = tiny_tree(task, where)
        rows = Path(tree["data"]["train"])
        rows.write_text(rows.read_text().replace(" e", " <tool>"))
        assert "<tool>" in rows.read_text()
        return Recipe.of(tree | {"method": "lora"})[0]

    return make


@pytest.mark.parametrize("task", ["causal-lm", "sft", "text-classification"])
def test_row_44_45_tokens_that_the_base_has_no_rows_for_are_named_before_training(grown, cli, task):
    """The library's own word for it is "index out of range in self", in the first step."""
    recipe = grown(task, tied=False)
    tree = {"model": recipe.model.checkpoint, "task": task, "method": "lora", "data": recipe.data.train}
    code, out, err = cli("check", *(f"{key}={value}" for key, value in tree.items()))
    assert code == 0, err
    assert "2 tokens beyond the" in out + err
    assert "'<tool>', '<end>'" in out + err


@pytest.mark.parametrize(("task", "tied"), [("causal-lm", True), ("causal-lm", False), ("text-classification", False)])
def test_of_the_tables_only_the_rows_of_new_tokens_move(grown, task, tied):
    ready = checking.prepare(grown(task, tied))
    task_object, loaded = load_grown(ready)
    ids, rows = loaded.helpers["new_tokens"], loaded.helpers["new_tokens"][0]
    assert [loaded.processor.convert_tokens_to_ids(token) for token in NEW] == ids
    assert any("'<tool>', '<end>'" in note for note in loaded.notes)
    base = copy.deepcopy(loaded.model)
    old = base.get_input_embeddings().weight
    torch.testing.assert_close(old[ids[0]], old[:rows].mean(0))
    model = ready.method.apply(loaded.model, loaded)
    batch = task_object.collate([task_object.encode(r, loaded) for r in ready.data.train[:16]])
    assert (batch["input_ids"] == ids[0]).any()
    optimizer = torch.optim.SGD(ready.method.groups(model, loaded, 0.5, 0.0))
    for _ in range(2):  # at first B is nothing, and so is the gradient of A
        sum(task_object.loss(model, batch, loaded).totals.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.eval()
        merged = ready.method.merge(model).eval()
        own = task_object.predict(model, batch, loaded)
        same_answers(own, task_object.predict(merged, batch, loaded), abs=2e-5)
        with ready.method.reference(model, None) as reference:
            same_answers(
                task_object.predict(base.eval(), batch, loaded), task_object.predict(reference, batch, loaded), abs=1e-6
            )
    new = merged.get_input_embeddings().weight
    assert torch.equal(new[:rows], old[:rows])
    assert not torch.equal(new[ids[0]], old[ids[0]])
    if task == "causal-lm":
        before, after = base.get_output_embeddings().weight, merged.get_output_embeddings().weight
        assert (after is new) == tied
        assert torch.equal(after[:rows], before[:rows])
        assert not any(torch.equal(after[i], before[i]) for i in ids)


@pytest.mark.parametrize(("task", "tied"), [("causal-lm", True), ("causal-lm", False), ("text-classification", False)])
def test_c34_new_tokens_are_saved_and_opened_by_the_lines_of_the_card(grown, tmp_path, task, tied):
    import peft
    import transformers

    ready = checking.prepare(grown(task, tied))
    task_object, loaded = load_grown(ready)
    torch.manual_seed(0)
    model = ready.method.apply(loaded.model, loaded).eval()
    moved(model)
    ready.method.save(model, loaded, tmp_path)
    vocabulary.describe_base(tmp_path / "config.json", loaded)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tables = [tensor for name, tensor in tensors.items() if "trainable_tokens" in name]
    assert [table.shape for table in tables] == [(2, 16)] * (2 if task == "causal-lm" and not tied else 1)
    auto = getattr(transformers, type(task_object).auto_class)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    there = {"base": auto.from_pretrained(ready.recipe.model.checkpoint, config=config)}
    exec("\n".join(loaded.helpers["growing"]), there)
    opened = peft.PeftModel.from_pretrained(there["base"], str(tmp_path)).eval()
    again = load_grown(ready)[1]
    ours = ready.method.open(again, tmp_path).eval()
    batch = task_object.collate([task_object.encode(r, loaded) for r in ready.data.train[:4]])
    with torch.no_grad():
        own = task_object.predict(model, batch, loaded)
        same_answers(own, task_object.predict(opened, batch, loaded), abs=1e-6)
        same_answers(own, task_object.predict(ours, batch, again), abs=1e-6)


@pytest.mark.parametrize(("task", "method"), [("causal-lm", "lora"), ("text-classification", "bottleneck")])
def test_the_card_of_a_run_with_new_tokens_opens_what_was_trained(grown, tmp_path, monkeypatch, task, method):
    """A config.json with more rows than the base has would give it a random table, without a word."""
    recipe = dataclasses.replace(grown(task, False), method=Choice(method), train=TrainSpec(max_steps=2))
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    monkeypatch.chdir(run.path)
    there: dict = {}
    exec("\n".join(run.read_json("usage.json")["load"]), there)
    ours = open_run(run.path)
    batch = ours.task.collate([ours.task.encode(r, ours.loaded) for r in checking.prepare(recipe).data.train[:4]])
    with torch.no_grad():
        own = ours.task.predict(ours.model.eval(), batch, ours.loaded)
        same_answers(own, ours.task.predict(there["model"].eval(), batch, ours.loaded), abs=1e-5)


def load_grown(ready):
    task, loaded = checking.load(ready)
    vocabulary.grow(loaded)
    return task, loaded


def test_tables_that_are_large_enough_stay_as_they_are(tiny_recipe):
    ready = checking.prepare(tiny_recipe())
    _, loaded = checking.load(ready)
    before, notes = loaded.model.get_input_embeddings(), list(loaded.notes)
    vocabulary.grow(loaded)
    assert loaded.model.get_input_embeddings() is before
    assert "new_tokens" not in loaded.helpers
    assert loaded.notes == notes


def test_an_output_layer_with_a_bias_is_refused_because_peft_would_lose_it(grown):
    ready = checking.prepare(grown("causal-lm", False))
    _, loaded = load_grown(ready)
    head = loaded.model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with pytest.raises(MethodError, match=r"lm_head cannot train.*bias"):
        ready.method.apply(loaded.model, loaded)


# --------------------------------------------------------------------- convolutions
def test_convolutions_that_a_model_reads_keep_what_it_reads(tmp_path, tiny_recipe):
    """MobileNetV2 pads by hand and asks each convolution for its stride, which peft's wrapper does not have."""
    import transformers

    tree = tiny_tree("image-classification", tmp_path)
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.25, image_size=16, id2label={0: "sky", 1: "sea"}, label2id={"sky": 0, "sea": 1}
    )
    torch.manual_seed(0)
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "base")
    recipe = Recipe.of(tree | {"method": "lora", "train": {"max_steps": 2, "precision": "float32"}})[0]
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    usage = json.loads((run.path / "usage.json").read_text())
    assert any("stride" in line for line in usage["load"])
    there: dict = {}
    import os

    here = os.getcwd()
    os.chdir(run.path)
    try:
        exec("\n".join(usage["load"]), there)
    finally:
        os.chdir(here)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = open_run(run.path).model(pixel_values=pixels).logits
        torch.testing.assert_close(there["model"].eval()(pixel_values=pixels).logits, ours, atol=1e-5, rtol=1e-5)
