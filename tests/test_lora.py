"""The LoRA family against its formulas, numpy and plain peft; a start from the weights leaves the base bit-equal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import same_answers
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Callback, Layout, Loaded, Method
from tunewright.errors import MethodError, RecipeError
from tunewright.models import low_rank
from tunewright.recipe import Recipe
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


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_merges_saves_and_opens_with_plain_peft_on_the_untouched_base(tiny_recipe, tmp_path, name):
    import peft

    ready, task, loaded, model = adapted(tiny_recipe, **VARIANTS[name])
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


def test_merged_dora_rows_have_the_trained_lengths(tiny_recipe):
    ready, _, _, model = adapted(tiny_recipe, use_dora=True)
    moved(model)
    lengths = query(model).lora_magnitude_vector["default"].weight.detach()
    torch.testing.assert_close(query(ready.method.merge(model)).weight.norm(dim=1), lengths.abs(), atol=1e-5, rtol=1e-5)


def test_pissa_begins_with_the_top_of_numpys_singular_values(tiny_recipe):
    _, _, _, model = adapted(tiny_recipe, r=3, init_lora_weights="pissa")
    layer = query(model)
    u, s, v = np.linalg.svd(layer.base_layer.weight.detach().numpy())
    top = (u[:, :3] * s[:3]) @ v[:3]
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    np.testing.assert_allclose(product.detach().numpy(), top, atol=1e-5)


def test_eva_begins_with_the_main_directions_of_what_flows_in(tiny_recipe):
    ready, task, loaded, model = adapted(tiny_recipe, r=3, init_lora_weights="eva")
    inputs: list[torch.Tensor] = []
    handle = query(model).register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    steps = checking.planned_steps(ready, task, loaded)
    ready.method.start(model, task, loaded, steps.once_over())
    handle.remove()
    seen = torch.cat(inputs[: len(list(steps.once_over()))]).double().numpy()
    _, _, v = np.linalg.svd(seen, full_matrices=False)
    a = query(model).lora_A["default"].weight.detach().numpy()
    assert np.abs(np.abs((a * v[:3]).sum(1)) - 1).max() < 1e-4, "the same directions, up to their sign"
    assert any("EVA" in note for note in loaded.notes)


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
            rates[name] = float(((old - parameter).flatten() / gradient.flatten())[place])
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
    """A recipe for a two-layer Mixtral of four experts."""
    import transformers
    from conftest import tiny_tree

    where = tmp_path_factory.mktemp("mixture")
    tree = tiny_tree("causal-lm", where)
    config = transformers.AutoConfig.from_pretrained(where / "base")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=config.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
            max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0, initializer_range=0.15,
        )
    )  # fmt: skip
    for file in (where / "base").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(where / "base")

    def make(**keys):
        return Recipe.of(tree | keys)[0]

    return make


def test_experts_are_adapted_the_router_is_not_and_plain_peft_opens_it(mixture, tmp_path):
    import peft

    recipe = mixture(method="lora", train={"max_steps": 4, "learning_rate": 1e-2, "precision": "float32"})
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    tensors = load_file(run.path / "model" / "adapter_model.safetensors")
    assert sum("experts" in name for name in tensors) >= 8, "A and B of two fused weights in two layers"
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
    assert any("experts.gate_up_proj" in n for n in changed)
    assert any("experts.down_proj" in n for n in changed)
    assert not any("norm" in n or "embed" in n or "lm_head" in n for n in changed)


def test_experts_can_be_left_frozen_and_what_cannot_be_had_on_them_is_refused(mixture):
    ready = checking.prepare(mixture(method={"name": "lora", "target_parameters": []}))
    _, loaded = checking.load(ready)
    model = ready.method.apply(loaded.model, loaded)
    assert not any(p.requires_grad and "experts" in n for n, p in model.named_parameters())
    ready = checking.prepare(mixture(method={"name": "lora", "use_dora": True}))
    _, loaded = checking.load(ready)
    with pytest.raises(MethodError, match="use_dora cannot be had on the fused weights"):
        ready.method.apply(loaded.model, loaded)
    ready = checking.prepare(mixture(method={"name": "lora", "target_parameters": ["experts.gate_proj"]}))
    with pytest.raises(MethodError, match=r"gate_proj.*match no fused weight.*experts\.down_proj"):
        ready.method.apply(loaded.model, loaded)


# --------------------------------------------------------------------- convolutions
def test_convolutions_that_a_model_reads_keep_what_it_reads(tmp_path, tiny_recipe):
    """MobileNetV2 pads by hand and asks each convolution for its stride, which peft's wrapper does not have."""
    import transformers
    from conftest import tiny_tree

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
