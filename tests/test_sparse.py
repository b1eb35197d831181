"""Sparse fine-tuning: the mask against numpy, the step against SGD by hand, experts against a count by hand."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import same_answers, tiny_tree

from tunewright import find
from tunewright.contracts import Callback, Method
from tunewright.errors import MethodError, RecipeError
from tunewright.models import masks, tiny
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs import checking
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train

TEXT, IMAGE, WRITING = "text-classification", "image-classification", "causal-lm"


def sparse(**options) -> Method:
    return find.build("methods", "sparse", options, Method)


@pytest.fixture
def ready(tiny_recipe):
    """`ready(task)` -> (task, loaded, batches): the batches that `start` is given."""

    def make(name=TEXT, **keys):
        return opened(tiny_recipe(name, **keys))[1:]

    return make


def opened(recipe):
    """(prepared, task, loaded, the batches that `start` is given) of a recipe."""
    prepared = checking.prepare(recipe)
    task, loaded = checking.load(prepared)
    return prepared, task, loaded, list(checking.planned_steps(prepared, task, loaded).once_over())


def begun(method, task, loaded, batches):
    """The model as it stands before its first step."""
    model = method.apply(loaded.model, loaded)
    assert method.start(model, task, loaded, iter(batches)) is None
    return model


def mean_loss(task, model, batch, loaded):
    counts = task.weights(batch)
    return sum(total / counts[term] for term, total in task.loss(model, batch, loaded).totals.items())


def plain(loaded):
    """The base's parameters by name, copied."""
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


# ----------------------------------------------------------------- which weights
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", [TEXT, IMAGE, WRITING])
def test_the_mask_is_numpys_highest_absolute_gradient_of_the_base(ready, name, scope):
    task, loaded, batches = ready(name)
    base = copy.deepcopy(loaded.model).eval()
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    model = begun(sparse(density=0.03, scope=scope), task, loaded, batches)
    mine = {place: a.index.numpy() for place, a in masks.additions(model).items() if a.index is not None}

    names = [n for n, p in base.named_parameters() if n in places_by_hand(base, loaded)]
    totals = {n: np.zeros(base.get_parameter(n).numel()) for n in names}
    for batch in batches:
        slopes = torch.autograd.grad(mean_loss(task, base, batch, loaded), [base.get_parameter(n) for n in names])
        for n, slope in zip(names, slopes, strict=True):
            totals[n] += np.abs(slope.numpy().ravel())
    if scope == "tensor":
        expected = {n: np.sort(np.argsort(-t)[: max(1, round(0.03 * t.size))]) for n, t in totals.items()}
    else:
        every = np.concatenate(list(totals.values()))
        lowest = np.sort(every)[-round(0.03 * every.size)]
        expected = {n: np.flatnonzero(t >= lowest) for n, t in totals.items() if (t >= lowest).any()}
    assert mine.keys() == expected.keys()
    assert len(mine) >= 3
    for n, index in expected.items():
        # float64 sums here, float32 there: places may differ where two gradients are equal to six digits
        assert len(mine[n]) == len(index)
        assert len(np.setdiff1d(mine[n], index)) <= 0.02 * len(index)


def places_by_hand(model, loaded):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    head = (*loaded.fresh, loaded.layout.head)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and not n.startswith(head)}
    assert len(modules) >= 5
    return {f"{n}.weight" for n in modules}


def test_dropout_and_rows_with_nothing_to_learn_leave_the_mask_as_it_is(tmp_path):
    recipe = Recipe.of(tiny_tree(TEXT, tmp_path, n=30, dropout=0.5) | {"method": {"name": "sparse", "density": 0.1}})[0]
    prepared, task, loaded, batches = opened(recipe)
    empty = batches[0] | {"weights": torch.zeros_like(batches[0]["weights"])}
    assert set(task.weights(empty).values()) == {0.0}
    chosen = []
    for given in (batches, [empty, *batches]):
        again = copy.deepcopy(loaded)
        again.model.train()
        model = begun(prepared.method, task, again, given)
        chosen.append({place: a.index.tolist() for place, a in masks.additions(model).items() if a.index is not None})
        torch.manual_seed(7)
    assert chosen[0] == chosen[1] != {}


def test_by_magnitude_the_largest_weights_are_chosen_and_at_random_others_than_by_gradient(ready):
    chosen = {}
    for selection in ("magnitude", "random", "gradient"):
        task, loaded, batches = ready()
        base = plain(loaded)
        model = begun(sparse(selection=selection, density=0.05, scope="tensor"), task, loaded, batches)
        chosen[selection] = {p: a.index for p, a in masks.additions(model).items() if a.index is not None}
    for place, index in chosen["magnitude"].items():
        size = base[place].abs().numpy().ravel()
        assert set(index.tolist()) == set(np.argsort(-size)[: len(index)].tolist())
    differ = [p for p, index in chosen["random"].items() if not torch.equal(index, chosen["gradient"][p])]
    assert len(differ) == len(chosen["random"]) >= 12


@pytest.mark.parametrize("density", [0.001, 0.01, 0.37, 1.0])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_budget_is_met_exactly(density, scope):
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(7, 11, generator=generator), "b": torch.rand(5, 3, 2, generator=generator)}
    found = masks.highest(scores, density, scope)
    assert all(torch.equal(index, index.unique()) for index in found.values())
    sizes = {place: len(index) for place, index in found.items()}
    if scope == "tensor":
        assert sizes == {"a": max(1, round(77 * density)), "b": max(1, round(30 * density))}
    else:
        assert sum(sizes.values()) == max(1, round(107 * density))


def test_depthwise_convolutions_are_chosen_from_and_norms_tables_and_heads_are_not():
    import transformers

    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=2)
    model = transformers.MobileNetV2ForImageClassification(config)
    places = masks.products(model, ("classifier",))
    convolutions = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert places == [f"{n}.weight" for n in convolutions]
    assert any(model.get_submodule(n).groups > 1 for n in convolutions)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    assert {p.split(".")[-2] for p in masks.products(gpt)} == {"c_attn", "c_proj", "c_fc"}


def test_tables_train_when_they_are_named_and_never_apart_from_a_tied_head(ready):
    task, loaded, batches = ready()
    model = begun(sparse(target_modules=["word_embeddings"], density=0.1), task, loaded, batches)
    index = masks.additions(model)["bert.embeddings.word_embeddings.weight"].index
    assert len(index) == round(0.1 * loaded.model.bert.embeddings.word_embeddings.weight.numel())
    import transformers

    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    assert "transformer.wte.weight" not in masks.matrices(gpt)
    assert "transformer.wpe.weight" in masks.matrices(gpt)


def test_targets_that_match_nothing_are_named_with_what_there_is(ready):
    _, loaded, _ = ready()
    with pytest.raises(MethodError, match=r"qurey.*match no module.*query"):
        sparse(target_modules=["qurey"]).apply(loaded.model, loaded)


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"density": 1.1}, {"batches": 0}, {"experts": 0.0}, {"experts": 2.0}, {"target_modules": "all"}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError):
        sparse(**options)


def test_quantised_weights_are_refused_with_a_way_out(ready):
    _, loaded, _ = ready()
    layer = loaded.model.bert.encoder.layer[0].output.dense
    layer.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(MethodError, match=r"quantised.*method=lora"):
        sparse().apply(loaded.model, loaded)


def test_rows_of_a_sorted_file_are_all_as_likely(monkeypatch):
    from tunewright.data.batches import sample

    kept = sample(iter([{"row": i} for i in range(1000)]), 64)
    rows = [batch["row"] for batch in kept]
    assert len(set(rows)) == 64
    assert 350 < np.mean(rows) < 650
    assert [b["row"] for b in sample(iter([{"row": i} for i in range(5)]), 64)] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- what they do
def test_one_sgd_step_moves_a_chosen_weight_by_rate_times_gradient_and_no_other(ready):
    task, loaded, batches = ready()
    before = plain(loaded)
    method = sparse(density=0.02)
    model = begun(method, task, loaded, batches)
    base = copy.deepcopy(method.merge(model)).eval()  # nothing moved yet: the plain base
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name])
        p.requires_grad_(True)
    mean_loss(task, base, batches[0], loaded).backward()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mean_loss(task, model.eval(), batches[0], loaded).backward()
    optimizer.step()
    additions = masks.additions(model)
    after = dict(method.merge(model).named_parameters())
    moved = 0
    for name, p in base.named_parameters():
        expected = before[name].clone()
        if name in additions and additions[name].index is not None:
            index = additions[name].index
            expected.view(-1)[index] -= 0.1 * p.grad.reshape(-1)[index]
            moved += len(index)
        elif name in additions:
            expected -= 0.1 * p.grad
        torch.testing.assert_close(after[name].detach(), expected, atol=1e-7, rtol=1e-6)
        if name not in additions:
            assert torch.equal(after[name], before[name])
    assert moved == round(0.02 * sum(before[n].numel() for n in places_by_hand(base, loaded)))


@pytest.mark.parametrize("name", [TEXT, IMAGE])
def test_with_every_weight_it_is_full_fine_tuning_of_these_matrices(ready, name):
    task, loaded, batches = ready(name)
    full = copy.deepcopy(loaded.model).eval()
    model = begun(sparse(density=1.0, scope="tensor"), task, loaded, batches).eval()
    for n, p in full.named_parameters():
        p.requires_grad_(n in masks.additions(model))
    stepping = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (full, model)]
    for batch in [*batches, *batches][:6]:
        for net, optimizer in zip((full, model), stepping, strict=True):
            optimizer.zero_grad()
            mean_loss(task, net, batch, loaded).backward()
            optimizer.step()
    merged = dict(sparse().merge(model).named_parameters())
    for n, p in full.named_parameters():
        torch.testing.assert_close(merged[n], p, atol=1e-6, rtol=0)


class Bytes(Callback):
    def on_start(self, state, model):
        self.model = model
        self.before = {n: t.clone() for n, t in model.state_dict().items()}

    def on_end(self, state, model):
        self.after = {n: t.clone() for n, t in model.state_dict().items()}


def test_a_run_changes_the_chosen_positions_alone_and_saves_them_as_a_plain_model(tiny_recipe, tmp_path):
    recipe = tiny_recipe(TEXT, method={"name": "sparse", "density": 0.01}, train={"learning_rate": 0.01})
    watch = Bytes()
    run = train(recipe, tmp_path / "run", callbacks=[watch], quiet=True, say=lambda text: None)
    additions = masks.additions(watch.model)
    assert [n for n in watch.before if not watch.before[n].equal(watch.after[n])] == [
        n for n in watch.before if n.endswith(".values")
    ]
    base = checking.load(checking.prepare(recipe))[1].model.state_dict()
    saved = open_run(run.path).model.state_dict()
    assert base.keys() == saved.keys()
    changed = 0
    for name, tensor in base.items():
        places = (tensor != saved[name]).flatten().nonzero().flatten()
        if name in additions and additions[name].index is not None:
            assert set(places.tolist()) <= set(additions[name].index.tolist())
            changed += len(places)
        elif name not in additions:
            assert tensor.equal(saved[name]), name
    budget = round(0.01 * sum(base[n].numel() for n in base if n in places_by_hand_named(base)))
    assert 0.9 * budget <= changed <= budget


def places_by_hand_named(base):
    chosen = {n for n, t in base.items() if t.ndim == 2 and "embeddings" not in n and not n.startswith("classifier")}
    assert len(chosen) == 13, "six in each of two blocks, and the pooler"
    return chosen


def test_what_is_saved_opens_without_this_package(tiny_recipe, tmp_path):
    recipe = tiny_recipe(WRITING, method="sparse", train={"learning_rate": 0.01})
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    program = f"""
import sys, torch
sys.modules["tunewright"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(run.path / "model")!r}).eval()
print(model(input_ids=torch.arange(4, 12)[None]).logits.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = open_run(run.path).model(input_ids=torch.arange(4, 12)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(ours, rel=1e-6)  # a sum of ten, and other products


# ------------------------------------------------------------- keeping and undoing
def stirred(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("options", [{}, {"density": 0.3, "scope": "tensor"}, {"selection": "random"}])
def test_state_puts_mask_and_values_back_into_a_newly_applied_model(ready, options):
    task, loaded, batches = ready()
    again = copy.deepcopy(loaded)
    method = sparse(**options)
    model = stirred(begun(method, task, loaded, batches)).eval()
    state = {name: tensor.clone() for name, tensor in method.state(model).items()}
    torch.manual_seed(5)
    other = method.apply(again.model, again).eval()
    method.restore(other, dict(sorted(state.items())))
    # in the same order too: the last bit of a gradient's norm depends on it
    trains = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, other)]
    assert trains[0] == trains[1]
    assert set(trains[0]) <= state.keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        one, two = (task.predict(m, batches[0], loaded) for m in (model, other))
    assert one == two


def test_the_order_of_what_trains_does_not_depend_on_the_order_it_was_added_in():
    """The norm of all gradients is summed in this order, and a resumed run must clip by the same last bit."""
    orders = []
    for places in (["weight", "bias"], ["bias", "weight"]):
        layer = torch.nn.Linear(3, 2)
        for place in places:
            masks.add(layer, place)
        orders.append([name for name, p in layer.named_parameters() if name.endswith("values")])
    assert orders[0] == orders[1] != []


def test_a_state_of_another_model_is_refused(ready):
    _, loaded, _ = ready()
    model = sparse().apply(loaded.model, loaded)
    with pytest.raises(KeyError):
        sparse().restore(model, {"bert.nothing.parametrizations.weight.0.values": torch.zeros(3)})
    with pytest.raises(KeyError):
        sparse().restore(model, {"bert.nothing.weight": torch.zeros(3)})


def test_the_reference_is_the_base_and_comes_back(ready):
    task, loaded, batches = ready()
    with torch.no_grad():
        base = task.predict(loaded.model.eval(), batches[0], loaded)
        model = stirred(sparse().apply(loaded.model, loaded)).eval()
        moved = task.predict(model, batches[0], loaded)
        with sparse().reference(model, None) as reference:
            assert task.predict(reference, batches[0], loaded) == base, "its new head too"
        assert task.predict(model, batches[0], loaded) == moved != base


def test_merging_leaves_the_model_whole_and_the_merged_one_plain(ready):
    """torch's own removal takes the weights of every copy: a merged copy would break the model it was made from."""
    task, loaded, batches = ready(WRITING, train={"packing": False})
    names = set(loaded.model.state_dict())
    model = stirred(sparse(density=0.2).apply(loaded.model, loaded)).eval()
    with torch.no_grad():
        own = task.predict(model, batches[0], loaded)
        merged = sparse().merge(model).eval()
        assert task.predict(model, batches[0], loaded) == own
        same_answers(task.predict(merged, batches[0], loaded), own, abs=1e-6)
    assert set(merged.state_dict()) == names
    assert not any(hasattr(module, "parametrizations") for module in merged.modules())
    assert {type(m).__module__.partition(".")[0] for m in merged.modules()} <= {"torch", "transformers"}


def test_a_base_in_half_precision_keeps_its_bytes_and_merges_in_float32(ready):
    task, loaded, batches = ready(WRITING)
    loaded.model.to(torch.bfloat16)
    before = plain(loaded)
    model = begun(sparse(density=0.1), task, loaded, batches)
    for place, addition in masks.additions(model).items():
        assert addition.values.dtype == torch.float32
        owner, _, name = place.rpartition(".")
        assert getattr(model.get_submodule(owner), name).dtype == torch.bfloat16
        addition.values.data.fill_(1e-6)  # far below what bf16 can add to a weight
    merged = dict(sparse().merge(model).named_parameters())
    for place, addition in masks.additions(model).items():
        moved = merged[place].double().flatten() - before[place].double().flatten()
        assert moved[addition.index].abs().sum() > 0
    assert all(p.dtype == torch.float32 for p in merged.values())


def test_decay_is_none_as_it_would_only_pull_to_the_base(ready):
    _, loaded, _ = ready()
    model = sparse().apply(loaded.model, loaded)
    assert [group["weight_decay"] for group in sparse().groups(model, loaded, 1e-3, 0.1)] == [0.0]


# ------------------------------------------------------------ mixtures of experts
EXPERTS = 6


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def mixture(request, tmp_path_factory):
    """`mixture(**method options)` -> recipe on a tiny mixture of experts with the word tokenizer of the tiny Llama."""
    import transformers

    where = tmp_path_factory.mktemp("mixture")
    base = where / "base"
    base.mkdir()
    tiny.causal_lm(base)
    vocabulary = transformers.AutoTokenizer.from_pretrained(base).vocab_size
    settings = {
        "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
        "num_experts_per_tok": 2, "initializer_range": 0.15, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    if request.param == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=EXPERTS, **settings)
        transformers.MixtralForCausalLM(config).save_pretrained(base)
    else:
        config = transformers.Qwen3MoeConfig(num_experts=EXPERTS, decoder_sparse_step=1, **settings)
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(base)
    tree = tiny_tree(WRITING, where, n=40)

    def make(train=None, **options):
        return Recipe.of(tree | {"method": {"name": "sparse", **options}, "train": train or {}})[0]

    return make


def tokens_by_hand(model, batches):
    """(layers, E): the router's own choice, counted token by token, padding left out."""
    counts = np.zeros((2, EXPERTS), dtype=int)
    seen = []
    routers = [layer.mlp.gate for layer in model.model.layers]
    handles = [router.register_forward_hook(lambda m, args, out: seen.append(out[0])) for router in routers]
    with torch.no_grad():
        for batch in batches:
            seen.clear()
            keys = ("input_ids", "attention_mask", "position_ids")
            model(**{k: batch[k] for k in keys if k in batch}, use_cache=False)
            real = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else slice(None)
            for layer, logits in enumerate(seen):
                for row in logits.reshape(-1, EXPERTS)[real]:
                    counts[layer, row.topk(2).indices.numpy()] += 1
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize(("share", "packed"), [(0.2, False), (0.5, True), (0.8, False)])
def test_the_chosen_experts_are_those_that_most_tokens_go_to(mixture, share, packed):
    recipe = mixture(experts=share, train={"packing": packed})
    prepared, task, loaded, batches = opened(recipe)
    counts = tokens_by_hand(loaded.model.eval(), batches)
    model = begun(prepared.method, task, loaded, batches)
    assert counts.min(1).tolist() != counts.max(1).tolist(), "they are used unevenly"
    for layer, count in enumerate(counts):
        order = sorted(range(EXPERTS), key=lambda e: (-count[e], e))
        fewest = next(n for n in range(1, EXPERTS + 1) if sum(count[order[:n]]) >= share * count.sum())
        for name in ("gate_up_proj", "down_proj"):
            addition = masks.additions(model)[f"model.layers.{layer}.mlp.experts.{name}"]
            assert addition.index.tolist() == sorted(order[:fewest])
            assert addition.values.shape[0] == fewest


def test_padding_is_no_token_that_an_expert_is_used_for(mixture):
    _, _, loaded, batches = opened(mixture(experts=0.2, train={"packing": False}))
    batch = next(b for b in batches if not b["attention_mask"].all())
    model = loaded.model.eval()
    rows = [slice(i, i + 1) for i in range(len(batch["input_ids"]))]
    with torch.no_grad():
        with masks.counted_tokens(model) as counts:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        with masks.counted_tokens(model) as alone:
            for row in rows:  # each sentence by itself, with nothing to pad and no mask
                model(input_ids=batch["input_ids"][row][:, : int(batch["attention_mask"][row].sum())])
        with masks.counted_tokens(model) as padded:
            model(input_ids=batch["input_ids"])
    for found, expected, more in zip(counts.values(), alone.values(), padded.values(), strict=True):
        assert found.tolist() == expected.tolist()
        assert int(found.sum()) == 2 * int(batch["attention_mask"].sum()) < int(more.sum())


def test_a_linear_router_is_known_by_its_rows_and_left_alone():
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.table = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((5, 3, 4), (5, 4)))

    block = torch.nn.ModuleDict({"gate": torch.nn.Linear(4, 5), "experts": Fused(), "shared": torch.nn.Linear(4, 3)})
    model = torch.nn.Sequential(torch.nn.Conv1d(5, 4, 2), block)
    assert masks.expert_modules(model) == {"1.experts": ["1.experts.up", "1.experts.table"]}
    assert masks.products(model) == ["0.weight", "1.experts.up", "1.shared.weight"]
    assert masks.expert_modules(torch.nn.Sequential(torch.nn.ModuleDict({"experts": Fused()}))) == {}, "no router"


def test_the_fewest_experts_that_reach_the_share():
    counts = torch.tensor([5, 20, 5, 60, 10])
    assert [masks.most_used(counts, p).tolist() for p in (0.1, 0.6, 0.61, 0.8, 0.9, 0.95, 1.0)] == [
        [3], [3], [1, 3], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert masks.most_used(torch.tensor([0, 4, 4]), 0.5).tolist() == [1], "of equals the first"
    assert masks.most_used(torch.tensor([0, 7, 0]), 1.0).tolist() == [1], "one that is never used is never needed"


def test_other_experts_router_attention_and_tables_keep_their_bytes(mixture, tmp_path):
    recipe = mixture(experts=0.3, train={"learning_rate": 0.01})
    watch = Bytes()
    run = train(recipe, tmp_path / "run", callbacks=[watch], quiet=True, say=lambda text: None)
    chosen = {place: a.index.tolist() for place, a in masks.additions(watch.model).items()}
    base = opened(recipe)[2].model.state_dict()
    saved = open_run(run.path).model.state_dict()
    assert base.keys() == saved.keys()
    assert {name for name in base if not base[name].equal(saved[name])} == chosen.keys()
    assert len(chosen) == 4
    for place, experts in chosen.items():
        changed = [e for e in range(EXPERTS) if not base[place][e].equal(saved[place][e])]
        assert changed == experts
        assert 0 < len(experts) < EXPERTS


def test_all_experts_are_the_dense_change_of_the_fused_weights(mixture):
    prepared, task, loaded, batches = opened(mixture(experts=1.0))
    dense = copy.deepcopy(loaded.model).eval()
    model = begun(prepared.method, task, loaded, batches).eval()
    assert all(a.index.tolist() == list(range(EXPERTS)) for a in masks.additions(model).values())
    for n, p in dense.named_parameters():
        p.requires_grad_(".experts." in n)
    stepping = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (dense, model)]
    for batch in batches[:4]:
        for net, optimizer in zip((dense, model), stepping, strict=True):
            optimizer.zero_grad()
            mean_loss(task, net, batch, loaded).backward()
            optimizer.step()
    merged = dict(prepared.method.merge(model).named_parameters())
    for n, p in dense.named_parameters():
        torch.testing.assert_close(merged[n], p, atol=1e-6, rtol=0)


def test_identical_experts_are_one_dense_layer_and_one_of_them_is_enough(mixture):
    prepared, task, loaded, batches = opened(mixture(experts=0.2))
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, name)
                weight.copy_(weight[:1].expand_as(weight))
            layer.mlp.gate.weight.zero_()
    mlp = loaded.model.model.layers[0].mlp
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    gate, up = (x @ mlp.experts.gate_up_proj[0].T).chunk(2, dim=-1)
    dense = (torch.nn.functional.silu(gate) * up) @ mlp.experts.down_proj[0].T
    scale = mlp(x) / dense  # one number: what the router's weights of two equal experts sum to
    torch.testing.assert_close(scale, scale.mean().expand_as(scale), atol=1e-4, rtol=1e-4)
    model = begun(prepared.method, task, loaded, batches)
    for addition in masks.additions(model).values():
        assert len(addition.index) == 1, "two experts of two take half each: one alone reaches a fifth"


def test_a_mask_over_a_mixture_reaches_its_experts_and_leaves_the_router_alone(mixture):
    prepared, task, loaded, batches = opened(mixture(density=0.05, scope="tensor"))
    model = begun(prepared.method, task, loaded, batches)
    places = masks.additions(model)
    assert sum(".experts." in place for place in places) == 4
    assert sum(".self_attn." in place for place in places) == 8
    assert len(places) == 12, "no router, no table, no vocabulary"


def test_experts_of_a_resumed_run_are_those_of_the_first_start(mixture, tmp_path):
    class Stop(Callback):
        def on_step(self, state, logs):
            if state.step == 3:
                raise KeyboardInterrupt

    recipe = mixture(experts=0.3, train={"learning_rate": 0.01, "save_steps": 2, "num_train_epochs": 2})
    straight = train(recipe, tmp_path / "straight", quiet=True, say=lambda text: None)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "broken", callbacks=[Stop()], quiet=True, say=lambda text: None)
    broken = train(recipe, tmp_path / "broken", quiet=True, say=lambda text: None)
    files = [RunDir.open(run.path).path / "model" / "model.safetensors" for run in (straight, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    steps = [json.loads(line)["step"] for line in (broken.path / "metrics.jsonl").read_text().splitlines() if line]
    assert steps == sorted(steps)


def test_experts_are_refused_where_there_are_none(ready):
    _, loaded, _ = ready()
    with pytest.raises(MethodError, match=r"no mixture of experts.*method=lora"):
        sparse(experts=0.2).apply(loaded.model, loaded)


def test_experts_that_are_not_told_their_tokens_are_refused(mixture, monkeypatch):
    prepared, task, loaded, batches = opened(mixture(experts=0.2))
    model = prepared.method.apply(loaded.model, loaded)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        monkeypatch.setattr(layer.mlp, "forward", lambda x, experts=experts: x)
    with pytest.raises(MethodError, match=r"not told which experts.*method=lora"):
        prepared.method.start(model, task, loaded, iter(batches))


def test_each_fused_weight_is_made_once_a_forward_pass(mixture, monkeypatch):
    """Once an expert instead would keep as many copies of all experts for the backward pass."""
    prepared, task, loaded, batches = opened(mixture(experts=0.5))
    model = prepared.method.apply(loaded.model, loaded)
    made = []
    forward = masks.Addition.forward
    monkeypatch.setattr(masks.Addition, "forward", lambda self, base: made.append(1) or forward(self, base))
    mean_loss(task, model, batches[0], loaded)
    assert len(made) == len(masks.additions(model)) == 4
