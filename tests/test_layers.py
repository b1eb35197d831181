"""Layer by layer: exactly the named parameters move, at their own rate, from their own time on; and anchored decay."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tunewright import find
from tunewright.contracts import Callback, Layout, Loaded, Method
from tunewright.engine import checkpoint, optimizers, schedules
from tunewright.engine import fit as engine
from tunewright.errors import MethodError, RecipeError
from tunewright.methods import layers as module
from tunewright.models import tiny
from tunewright.models.surgery import set_mode
from tunewright.rundir import RunDir
from tunewright.runs import checking

SGD = {
    "max_steps": 12, "optim": "sgd", "learning_rate": 0.05, "precision": "float32", "lr_scheduler_type": "constant",
    "warmup_steps": 0, "max_grad_norm": 0,
}  # fmt: skip
BODY, TEXT_HEAD = "bert.encoder.layer", "classifier"


class Killed(Exception):
    """As if the process had been killed."""


@dataclass
class Fitted:
    """One run of the engine: what it made, and what was seen on the way."""

    model: nn.Module
    loaded: Loaded
    run: RunDir
    base: dict[str, torch.Tensor]
    steps: list[dict[str, torch.Tensor]] = field(default_factory=list)  # everything, before the first and after each


@pytest.fixture
def fitted(tiny_recipe, tmp_path):
    """`fitted("text-classification", method={...}, train={...})`: through the engine, without reports."""

    def run(task_name="text-classification", *, folder="run", kill=None, evaluate=None, train=None, **keys) -> Fitted:
        ready = checking.prepare(tiny_recipe(task_name, train=SGD | (train or {}), **keys))
        task, loaded = checking.load(ready)
        made = Fitted(loaded.model, loaded, RunDir(tmp_path / folder), everything(loaded.model))
        (made.run.path / "checkpoints").mkdir(parents=True, exist_ok=True)

        class Watch(Callback):
            def on_start(self, state, model):
                made.steps.append(everything(model))

            def on_step(self, state, logs):
                made.steps.append(everything(made.model))
                if state.step == kill:
                    raise Killed

        engine.fit(
            task, ready.method, loaded, checking.planned_steps(ready, task, loaded), ready.recipe.train, made.run,
            digest="d", evaluate=evaluate, callbacks=[Watch()],
        )  # fmt: skip
        return made

    return run


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of what is not the same, byte for byte."""
    assert before.keys() == after.keys()
    return {n for n, t in before.items() if t.numpy().tobytes() != after[n].numpy().tobytes()}


def under(model: nn.Module, *places: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(places)}


def applied(tiny_recipe, task_name="text-classification", model=None, **options) -> tuple[Method, nn.Module, Loaded]:
    keys = {"model": str(model)} if model else {}
    ready = checking.prepare(tiny_recipe(task_name, method={"name": "layers", **options}, **keys))
    _, loaded = checking.load(ready)
    return ready.method, ready.method.apply(loaded.model, loaded), loaded


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------ exactly the named set
NORMS = {f"{BODY}.{i}.{n}.LayerNorm" for i in (0, 1) for n in ("attention.output", "output")} | {
    "bert.embeddings.LayerNorm"
}
PRODUCTS = [f"attention.{n}" for n in ("self.query", "self.key", "self.value", "output.dense")]
RESNET = "resnet.encoder.stages"
SELECTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "last": ("text-classification", {"last": 1}, (f"{BODY}.1.", "bert.pooler", TEXT_HEAD)),
    "first": ("text-classification", {"first": 1}, (f"{BODY}.0.", "bert.embeddings", TEXT_HEAD)),
    "attention": (
        "text-classification",
        {"only": "attention"},
        (*(f"{BODY}.{i}.{n}." for i in (0, 1) for n in PRODUCTS), TEXT_HEAD),
    ),
    "mlp": (
        "text-classification",
        {"only": "mlp"},
        (*(f"{BODY}.{i}.{n}" for i in (0, 1) for n in ("intermediate.", "output.dense.")), TEXT_HEAD),
    ),
    "norms": ("text-classification", {"only": "norms"}, (*NORMS, TEXT_HEAD)),
    "match": ("text-classification", {"match": [r"\.query\.", "word_emb"]}, (
        *(f"{BODY}.{i}.attention.self.query." for i in (0, 1)), "bert.embeddings.word_embeddings", TEXT_HEAD,
    )),
    "both": ("text-classification", {"last": 1, "only": "attention"}, (
        *(f"{BODY}.1.{n}." for n in PRODUCTS), TEXT_HEAD,
    )),
    "image last": ("image-classification", {"last": 1}, (f"{RESNET}.1.", "classifier")),
    "image first": ("image-classification", {"first": 1}, (f"{RESNET}.0.", "resnet.embedder.", "classifier")),
    "causal last": ("causal-lm", {"last": 1}, ("model.layers.1.", "model.norm.")),
    "causal first": ("causal-lm", {"first": 1}, ("model.layers.0.", "model.embed_tokens.")),
    "causal all": ("causal-lm", {}, ("model.", "lm_head.")),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTIONS)
def test_exactly_the_named_parameters_move(fitted, name):
    task, options, places = SELECTIONS[name]
    made = fitted(task, method={"name": "layers", **options}, train={"max_steps": 2})
    expected = under(made.model, *places)
    assert expected
    assert moved(made.base, made.steps[-1]) == expected


def test_bitfit_trains_biases_and_the_head_and_nothing_else(fitted):
    """Two blocks of width 16 and 32; then the norm of the embeddings, the pooler, and the head of two labels."""
    made = fitted(method="bitfit", train={"max_steps": 2})
    expected = {n for n in made.base if n.endswith(".bias")} | under(made.model, TEXT_HEAD)
    assert moved(made.base, made.steps[-1]) == expected
    counted = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert counted == 2 * (4 * 16 + 32 + 16 + 2 * 16) + 16 + 16 + (2 * 16 + 2)


def test_norms_and_biases_are_found_in_a_convolutional_net(tiny_recipe):
    _, model, _ = applied(tiny_recipe, "image-classification", only="norms")
    affine = {f"{n}.{w}" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for w in ("weight", "bias")}
    assert trainable(model) == affine | under(model, "classifier")
    set_mode(model)
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_head_that_is_not_new_trains_unless_match_leaves_it_out(tiny_recipe):
    """A classifier that already speaks the labels: a selection of layers takes it along, an expression does not."""
    for options, expected in (({"last": 1}, True), ({"match": "embedder"}, False), ({"match": "classifier"}, True)):
        ready = checking.prepare(tiny_recipe("image-classification", method={"name": "layers", **options}))
        _, loaded = checking.load(ready)
        loaded.fresh = ()
        model = ready.method.apply(loaded.model, loaded)
        assert (under(model, "classifier") <= trainable(model)) == expected
        assert {g["lr"] for g in ready.method.groups(model, loaded, 1.0, 0.0)} <= {1.0, 0.8}, "only a new head is fast"


def test_a_shared_weight_is_found_under_each_of_its_names_and_counted_once():
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=9))
    from tunewright.models.layout import layout_of

    loaded = Loaded(model, None, layout_of(model))
    method = find.build("methods", "layers", {"match": "lm_head"}, Method)
    assert trainable(method.apply(model, loaded)) == {"transformer.wte.weight"}
    everything_trains = find.build("methods", "layers", {}, Method)
    everything_trains.apply(model, loaded)
    grouped = [n for g in everything_trains.groups(model, loaded, 1.0, 0.0) for n, _ in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    (table,) = [
        g for g in everything_trains.groups(model, loaded, 1.0, 0.0) if "transformer.wte.weight" in dict(g["params"])
    ]
    assert table["lr"] == pytest.approx(0.8**2), "the embedding's rate, although the head uses it too"


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("text-classification", {"last": 3}, r"method\.last: this model has 2 blocks; expected at most 2, got 3"),
        ("text-classification", {"first": 7}, r"method\.first: this model has 2 blocks.*got 7"),
        ("image-classification", {"only": "attention"}, "no attention; expected one of mlp, norms, biases"),
        ("causal-lm", {"only": "biases"}, "no biases; expected one of attention, mlp, norms.*lora"),
        ("text-classification", {"match": ["query", "qurey"]}, r"\['qurey'\] match no parameter.*bert\.embeddings"),
        ("text-classification", {"last": 1, "match": "word_embeddings"}, "no parameter fits all of last: 1, match"),
        ("causal-lm", {"head_first": True}, r"head_first: no head of its own.*full"),
        ("text-classification", {"head_first": True, "match": "classifier"}, "nothing but the head trains"),
    ],
)  # fmt: skip
def test_c57_a_selection_that_finds_nothing_is_refused_with_what_there_is(tiny_recipe, task, options, said):
    with pytest.raises(MethodError, match=said):
        applied(tiny_recipe, task, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"last": 0}, {"first": -1}, {"match": "("}, {"layer_decay": 0.0}, {"layer_decay": 1.5}, {"unfreeze": 0.0},
        {"unfreeze": 1.0}, {"head_first": 1.0}, {"head_first": -0.1}, {"head_learning_rate_ratio": 0.0},
        {"unfreeze": 0.3, "head_first": True}, {"only": "heads"},
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError):
        find.build("methods", "layers", options, Method)


# ---------------------------------------------------------------------- rates by depth
def one_sgd_step(tiny_recipe, model, **options) -> dict[str, float]:
    """Each parameter's rate as seen from outside: how far one step moved it, over its gradient. In float64."""
    ready = checking.prepare(tiny_recipe(method={"name": "layers", **options}, model=str(model)))
    task, loaded = checking.load(ready)
    model = ready.method.apply(loaded.model, loaded).double().eval()
    batch = next(checking.planned_steps(ready, task, loaded).once_over())
    optimizer = optimizers.build("sgd", ready.method.groups(model, loaded, 0.01, 0.0))
    optimizers.set_rate(optimizer, 1.0)
    task.loss(model, batch, loaded).totals["cross_entropy"].backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    rates = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            slope, delta = parameter.grad.flatten(), (before[name] - parameter.detach()).flatten()
            rates[name] = float(delta @ slope / (slope @ slope))
    return rates


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """Five blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return tiny.text_encoder(folder, num_hidden_layers=5)


@pytest.mark.parametrize(
    ("options", "decay"), [({}, 0.8), ({"layer_decay": 0.385}, 0.385), ({"layer_decay": 1.0}, 1.0)]
)
def test_one_step_moves_each_layer_at_its_own_rate(tiny_recipe, deep, options, decay):
    rates = one_sgd_step(tiny_recipe, deep, **options)
    expected = {n: 0.01 for n in rates if n.startswith("bert.pooler")} | {
        n: 0.1 for n in rates if n.startswith("class")
    }
    expected |= {n: 0.01 * decay ** (4 - i) for i in range(5) for n in rates if n.startswith(f"{BODY}.{i}.")}
    expected |= {n: 0.01 * decay**5 for n in rates if n.startswith("bert.embeddings")}
    assert len(expected) == len(rates) == 5 * 16 + 5 + 2 + 2
    assert rates == pytest.approx(expected, rel=1e-5)


def test_depth_is_counted_from_the_top_of_what_is_selected(tiny_recipe, deep):
    rates = one_sgd_step(tiny_recipe, deep, first=2, head_learning_rate_ratio=3.0)
    groups = {"layer.1.": 0.01, "layer.0.": 0.008, "bert.embeddings": 0.0064, "classifier": 0.03}
    assert rates == pytest.approx({n: rate for n in rates for key, rate in groups.items() if key in n}, rel=1e-5)


@pytest.mark.parametrize("options", [{"only": "biases"}, {"match": "dense"}, {"head_first": True}])
def test_parts_and_lp_ft_have_one_rate_at_every_depth_unless_asked(tiny_recipe, deep, options):
    method, model, loaded = applied(tiny_recipe, model=deep, **options)
    method.advance(model, loaded, 0.99)
    assert {g["lr"] for g in method.groups(model, loaded, 1.0, 0.0)} == {1.0, 10.0}, "the body's and the new head's"
    asked, model, loaded = applied(tiny_recipe, model=deep, **options, layer_decay=0.5)
    asked.advance(model, loaded, 0.99)
    assert 0.5 in {g["lr"] for g in asked.groups(model, loaded, 1.0, 0.0)}


# ------------------------------------------------------------------ unfreezing by stages
TEXT_STAGES = [(TEXT_HEAD,), (f"{BODY}.1.", "bert.pooler"), (f"{BODY}.0.",), ("bert.embeddings",)]
STAGES: dict[str, tuple[str, dict[str, Any], list[tuple[str, ...]], list[int]]] = {
    # twelve steps, unfrozen at half: three switches after the head fall on steps 2, 4 and 6
    "text": ("text-classification", {"unfreeze": 0.5}, TEXT_STAGES, [0, 2, 4, 6]),
    "image": (
        "image-classification",
        {"unfreeze": 0.5},
        [("classifier",), (f"{RESNET}.1.",), (f"{RESNET}.0.",), ("resnet.embedder",)],
        [0, 2, 4, 6],
    ),
    # no head of its own: the top block begins, and two switches are left
    "causal": (
        "causal-lm",
        {"unfreeze": 0.5},
        [("model.layers.1.", "model.norm.", "lm_head."), ("model.layers.0.",), ("model.embed_tokens.",)],
        [0, 3, 6],
    ),
    "last one only": ("text-classification", {"unfreeze": 0.5, "last": 1}, TEXT_STAGES[:2], [0, 6]),
    "head alone first": ("text-classification", {"head_first": 0.25}, [TEXT_STAGES[0], ("bert.",)], [0, 3]),
}


@pytest.mark.parametrize("name", STAGES)
def test_c28_in_each_stage_exactly_the_unfrozen_set_moves(fitted, monkeypatch, name):
    task, options, stages, switches = STAGES[name]
    monkeypatch.setattr(module, "solve_head", lambda *a: None)  # LP-FT where the head cannot be solved
    made = fitted(task, method={"name": "layers", **options})
    assert len(made.steps) == 13
    for i, begin in enumerate(switches):
        end = (*switches, 12)[i + 1]
        expected = set().union(*(under(made.model, *places) for places in stages[: i + 1]))
        assert moved(made.steps[begin], made.steps[end]) == expected, f"steps {begin} to {end}"
        late = under(made.model, *[place for places in stages[i + 1 :] for place in places])
        assert not moved(made.base, made.steps[end]) & late


def test_what_is_frozen_has_no_gradient_and_no_optimiser_state(fitted, monkeypatch):
    """After the fourth of twelve steps the lower block has just been freed; embeddings are still frozen."""
    seen = []
    monkeypatch.setattr(engine, "clip", lambda model, limit: seen.append(graded(model)) or 0.0)
    made = fitted(
        method={"name": "layers", "unfreeze": 0.5}, train={"optim": "adamw", "save_steps": 1, "save_total_limit": 99}
    )
    for step, places in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4)):
        now = set().union(*(under(made.model, *p) for p in TEXT_STAGES[:places]))
        assert seen[step - 1] == now
        _, tensors, _ = checkpoint.load(checkpoint.at_step(made.run, step))
        assert {key.partition("::")[0] for key in tensors["optimizer"]} == now


def graded(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("share", "blocks", "total"), [(0.3, 5, 100), (0.5, 5, 10), (0.9, 5, 7)])
def test_unfreezing_is_spread_evenly_and_done_at_the_given_share(tiny_recipe, deep, share, blocks, total):
    """After the head come n blocks and the embeddings: the i-th of n + 1 at the first step from share x i / (n + 1)."""
    method, model, loaded = applied(tiny_recipe, model=deep, unfreeze=share)
    parts = [f"{BODY}.{i}.output.dense.weight" for i in reversed(range(blocks))] + ["bert.embeddings.LayerNorm.bias"]
    first: dict[str, int] = {}
    for step in range(total + 1):
        before = trainable(model)
        assert method.advance(model, loaded, step / total) == (trainable(model) != before)
        for name in trainable(model):
            first.setdefault(name, step)
    by_hand = [math.ceil(total * round(100 * share) * i / (100 * (blocks + 1))) for i in range(1, blocks + 2)]
    assert [first[name] for name in parts] == by_hand
    assert first[f"{TEXT_HEAD}.weight"] == 0
    if (share, total) == (0.3, 100):
        assert by_hand == [5, 10, 15, 20, 25, 30]


def test_advance_is_a_pure_function_of_progress(tiny_recipe):
    """Resume asks once for the middle, training asked for every step before: the same set, and back again."""
    method, model, loaded = applied(tiny_recipe, unfreeze=0.5)
    walked = {}
    for step in range(13):
        method.advance(model, loaded, step / 12)
        walked[step] = trainable(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for step in (12, 0, 5, 3, 7):
        method.advance(model, loaded, step / 12)
        assert graded(model) <= trainable(model), "what is frozen again has no gradient"
        assert trainable(model) == walked[step]
        assert not method.advance(model, loaded, step / 12)


def test_c29_moments_of_old_groups_go_on_and_those_of_new_ones_begin_at_zero(fitted, monkeypatch):
    """Adam's running mean at the end is that of all gradients since the parameter was unfrozen, and of no other."""
    slopes = defaultdict(list)

    def note(model, limit):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                slopes[name].append(parameter.grad.detach().clone())
        return 0.0

    monkeypatch.setattr(engine, "clip", note)
    made = fitted(method={"name": "layers", "unfreeze": 0.5}, train={"optim": "adamw", "learning_rate": 1e-3})
    _, tensors, _ = checkpoint.load(checkpoint.at_step(made.run, 12))
    assert {len(slopes[n]) for n in under(made.model, TEXT_HEAD)} == {12}
    assert {len(slopes[n]) for n in under(made.model, "bert.embeddings")} == {6}
    for name, seen in slopes.items():
        mean = torch.zeros_like(seen[0])
        for slope in seen:
            mean = 0.9 * mean + 0.1 * slope
        torch.testing.assert_close(tensors["optimizer"][f"{name}::exp_avg"], mean, atol=1e-9, rtol=1e-4)
        assert tensors["optimizer"][f"{name}::step"] == len(seen)


@pytest.mark.parametrize(
    ("share", "places", "total", "began"), [(0.5, 4, 200, 25), (0.3, 10, 200, 6), (0.2, 3, 1000, 67)]
)
def test_a_late_group_is_warmed_up_from_its_own_first_step(share, places, total, began):
    """Ten steps up; the head, which has trained from the start, keeps its rate."""
    weights = [("a", nn.Parameter(torch.zeros(2, 2))), ("b", nn.Parameter(torch.zeros(2, 2)))]
    groups = [
        {"params": weights[:1], "lr": 2.0, "weight_decay": 0.0, "since": 0.0},
        {"params": weights[1:], "lr": 1.0, "weight_decay": 0.0, "since": share * (1 / places)},
    ]
    optimizer = optimizers.build("sgd", groups)
    for i in range(12):
        optimizers.set_rate(optimizer, 0.5, began + i, total)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1.0, 0.5 * min(1.0, (i + 1) / 11)])


def test_a_share_that_floats_cannot_hold_does_not_cost_a_step():
    """0.3 x 7 / 10 of 100 steps is 21.000000000000004 steps: it is the 21st, and its rate is not zero."""
    optimizer = optimizers.build(
        "sgd", [{"params": [("a", nn.Parameter(torch.zeros(1)))], "lr": 1.0, "since": 0.3 * 7 / 10}]
    )
    assert math.ceil(0.3 * 7 / 10 * 100) == 22
    assert optimizers.set_rate(optimizer, 1.0, 21, 100) == pytest.approx(1 / 6)


# --------------------------------------------------------------------- resume, best
# options, and the steps after which the run is killed: the checkpoint before it is resumed, of twelve
RESUMED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unfreezing": ({"unfreeze": 0.5}, (2, 3, 4, 5, 6, 7, 9)),  # stages begin with steps 2, 4 and 6
    "solved": ({"head_first": True}, (2, 7)),
    "stepped": ({"head_first": 0.3}, (2, 5, 6)),  # all from step 4 on
    "chosen": ({"unfreeze": 0.5, "only": "biases"}, (2, 4)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_c30_resumed_in_any_stage_ends_with_the_same_bytes(fitted, monkeypatch, name):
    """Killed in the middle of every stage and at each switch, and continued."""
    options, kills = RESUMED[name]
    if name == "stepped":
        monkeypatch.setattr(module, "solve_head", lambda *a: None)
    keys = {
        "method": {"name": "layers", **options},
        "train": {"optim": "adamw", "learning_rate": 5e-3, "save_steps": 1},
    }
    whole = fitted(folder="whole", **keys)
    for kill in kills:
        with pytest.raises(Killed):
            fitted(folder=f"killed-{kill}", kill=kill, **keys)
        assert checkpoint.latest(RunDir(whole.run.path.parent / f"killed-{kill}"), "d")[0].name == f"{kill - 1:06d}"
        again = fitted(folder=f"killed-{kill}", **keys)
        assert len(again.steps) == 12 - (kill - 1) + 1
        assert not moved(everything(whole.model), everything(again.model))
    _, one, _ = checkpoint.load(checkpoint.at_step(whole.run, 12))
    _, two, _ = checkpoint.load(checkpoint.at_step(again.run, 12))
    assert not moved(one["optimizer"], two["optimizer"])
    assert ("head_first.solved" in one["model"]) == (name == "solved")


def test_the_best_of_an_early_stage_puts_later_layers_back_to_the_base(fitted):
    """Validation is best after the first step, when only the head had moved; the rest has moved until the stop."""
    scores, seen = iter([1.0] + [0.5] * 11), []

    def evaluate(model):
        seen.append(everything(model))
        return {"accuracy": next(scores)}

    made = fitted(
        method={"name": "layers", "unfreeze": 0.5},
        train={"eval_steps": 1, "early_stopping_patience": 11, "optim": "adamw", "learning_rate": 1e-3},
        evaluate=evaluate,
    )
    assert len(seen) == 12
    assert moved(made.base, seen[-1]) == under(made.model, "bert.", TEXT_HEAD), "everything had moved"
    assert not moved(seen[0], everything(made.model))
    assert moved(made.base, everything(made.model)) == under(made.model, TEXT_HEAD)


# ----------------------------------------------------------------------------- LP-FT
@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
def test_lp_ft_starts_at_the_solved_head_and_then_all_train(fitted, task):
    solved = fitted(task, method="head", folder="solved")
    made = fitted(task, method="lp-ft", train={"max_steps": 2})
    head = under(made.model, "classifier")
    for name in head:
        assert torch.equal(made.steps[0][name], everything(solved.model)[name])
    assert moved(made.base, made.steps[0]) == head
    assert moved(made.steps[0], made.steps[1]) == {n for n, _ in made.model.named_parameters()}
    assert any("solved" in note and "train together" in note for note in made.loaded.notes)


def test_a_solved_head_has_the_rate_of_all_and_a_stepped_one_its_own(tiny_recipe):
    for ratio, expected in ((None, {1.0}), (5.0, {1.0, 5.0})):
        options = {} if ratio is None else {"head_learning_rate_ratio": ratio}
        ready = checking.prepare(tiny_recipe(method={"name": "layers", "head_first": True, **options}))
        task, loaded = checking.load(ready)
        model = ready.method.apply(loaded.model, loaded)
        assert {g["lr"] for g in ready.method.groups(model, loaded, 1.0, 0.0)} == {ratio or 10.0}
        assert trainable(model) == under(model, TEXT_HEAD)
        assert ready.method.start(model, task, loaded, checking.planned_steps(ready, task, loaded).once_over()) is None
        assert {g["lr"] for g in ready.method.groups(model, loaded, 1.0, 0.0)} == expected
        assert not ready.method.advance(model, loaded, 0.0)


class TwoLayers(nn.Module):
    """y = v B x: the linear net of Kumar et al. 2022, section 3."""

    def __init__(self, trunk: torch.Tensor, head: torch.Tensor):
        super().__init__()
        self.trunk, self.head = nn.Linear(30, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.trunk.weight.data, self.head.weight.data = trunk.clone(), head.clone()

    def forward(self, x):
        return self.head(self.trunk(x)).squeeze(-1)


def errors_of_two_layers(seed: int, **options: Any) -> tuple[float, float]:
    """Mean squared error on the 12 of 30 directions that are trained on, and on all."""
    rng = torch.Generator().manual_seed(seed)
    good, way = torch.linalg.qr(torch.randn(30, 3, generator=rng))[0].T, torch.randn(3, generator=rng)
    inside = torch.randn(40, 12, generator=rng) @ torch.linalg.qr(torch.randn(30, 12, generator=rng))[0].T
    outside = torch.randn(2000, 30, generator=rng)
    model = TwoLayers(good + 0.05 * torch.randn(3, 30, generator=rng), torch.randn(1, 3, generator=rng))
    loaded = Loaded(model, None, Layout(("trunk",), None, "head"), fresh=("head",))
    method = find.build("methods", "layers", {"head_learning_rate_ratio": 1.0, **options}, Method)
    model = method.apply(model, loaded)
    optimizer = optimizers.build("sgd", method.groups(model, loaded, 0.1, 0.0))
    for step in range(600):
        (model(inside) - inside @ good.T @ way).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if method.advance(model, loaded, (step + 1) / 600):
            optimizer = optimizers.build("sgd", method.groups(model, loaded, 0.1, 0.0))
    with torch.no_grad():
        one, two = ((model(x) - x @ good.T @ way).square().mean().item() for x in (inside, outside))
    return one, two


def test_lp_ft_keeps_good_features_where_a_random_head_distorts_them():
    """Both fit what they are trained on; elsewhere LP-FT errs less, for every draw (Kumar 2022, section 3)."""
    at_once = [errors_of_two_layers(seed, layer_decay=1.0) for seed in range(4)]
    head_first = [errors_of_two_layers(seed, head_first=0.5) for seed in range(4)]
    assert max(inside for inside, _ in at_once + head_first) < 1e-4
    assert all(two[1] < one[1] for one, two in zip(at_once, head_first, strict=True))
    assert sum(error for _, error in head_first) < sum(error for _, error in at_once) / 2


# -------------------------------------------------------------------------- what is said
def test_each_choice_has_its_rate_and_says_what_it_means():
    def built(**options):
        return find.build("methods", "layers", options, Method)

    rates = {option: built(**{"only": option}).recommended()[0] for option in module.KINDS}
    assert rates == {"attention": 3e-4, "mlp": 3e-4, "norms": 3e-3, "biases": 3e-3}
    assert built(last=2).recommended()[0] == built(match="x").recommended()[0] == 3e-4
    assert built(head_first=True).recommended()[0] == built(unfreeze=0.3).recommended()[0] == 1e-4
    assert all(len(built(**o).recommended()[1]) > 20 for o in ({"last": 1}, {"only": "norms"}, {"head_first": True}))
    assert "by 0.8 a block" in " ".join(built().remarks())
    assert "at 30% of the steps" in " ".join(built(unfreeze=0.3).remarks())
    assert "late" not in " ".join(built(unfreeze=0.5).remarks())
    assert "late" in " ".join(built(unfreeze=0.6).remarks())
    assert "lose to method=full" in " ".join(built(head_first=True).remarks())


def test_how_many_parameters_train_when_is_noted(tiny_recipe):
    _, model, loaded = applied(tiny_recipe, unfreeze=0.4)
    total = sum(p.numel() for p in model.parameters())
    assert f"34 parameters train at the start, {total:,} after 40% of the steps." in loaded.notes


# ---------------------------------------------------------------- the slanted triangle
def test_the_slanted_triangle_has_the_papers_end_points():
    """1/32 in the first step, 1 at a tenth, 1/32 at the end; halfway up and down by hand."""
    assert schedules.factor("slanted_triangular", 0, 100, 0) == pytest.approx(1 / 32)
    assert schedules.factor("slanted_triangular", 5, 100, 0) == pytest.approx((1 + 31 / 2) / 32)
    assert schedules.factor("slanted_triangular", 10, 100, 0) == 1.0
    assert schedules.factor("slanted_triangular", 55, 100, 0) == pytest.approx((1 + 31 / 2) / 32)
    assert schedules.factor("slanted_triangular", 100, 100, 0) == pytest.approx(1 / 32)


# ----------------------------------------------------------------------------- L2-SP
def test_anchored_decay_pulls_to_the_base_by_the_rate_of_the_step():
    """w0 = 2, gradient 3, rate 0.1: SGD goes to 1.7; half the way stays, as 1 + 0.1 x 10 = 2: 1.85. Then 1.775."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    loaded = Loaded(model, None, Layout((), None, None))
    method = find.build("methods", "full", {"l2_sp": 10.0}, Method)
    method.apply(model, loaded)
    optimizer = optimizers.build("sgd", method.groups(model, loaded, 0.1, 0.0))
    for expected in (1.85, 1.775):
        model(torch.full((1, 1), 3.0)).sum().backward()
        optimizer.step()
        method.after_step(model, optimizer.param_groups)
        optimizer.zero_grad()
        assert model.weight.item() == pytest.approx(expected)


def test_no_pull_is_full_tuning_and_a_huge_one_leaves_only_the_new_head(fitted):
    adam = {"optim": "adamw", "learning_rate": 5e-3, "weight_decay": 0.1}
    plain, zero, some, huge = (
        fitted(method={"name": "full", **options}, train=adam, folder=str(options))
        for options in ({}, {"l2_sp": 0.0}, {"l2_sp": 5.0}, {"l2_sp": 1e12})
    )
    assert not moved(everything(plain.model), everything(zero.model))
    head = under(huge.model, TEXT_HEAD)
    for name, value in huge.base.items():
        if name not in head:
            torch.testing.assert_close(everything(huge.model)[name], value, atol=1e-7, rtol=1e-6)
    assert moved(huge.base, everything(huge.model)) >= head

    def way(made):
        return sum((everything(made.model)[n] - t).square().sum() for n, t in made.base.items() if n not in head)

    assert way(huge) < way(some) < 0.9 * way(plain)


def test_a_resumed_run_is_pulled_to_the_same_base(fitted):
    keys = {
        "method": {"name": "full", "l2_sp": 20.0},
        "train": {"optim": "adamw", "learning_rate": 5e-3, "save_steps": 4},
    }
    whole = fitted(folder="whole", **keys)
    with pytest.raises(Killed):
        fitted(folder="killed", kill=7, **keys)
    again = fitted(folder="killed", **keys)
    assert len(again.steps) == 12 - 4 + 1
    assert not moved(everything(whole.model), everything(again.model))


def test_the_anchor_is_in_no_copy_and_no_file(tiny_recipe, tmp_path):
    ready = checking.prepare(tiny_recipe(method={"name": "full", "l2_sp": 1.0}))
    _, loaded = checking.load(ready)
    names = set(loaded.model.state_dict())
    model = ready.method.apply(loaded.model, loaded)
    assert set(model.state_dict()) == set(ready.method.merge(model).state_dict()) == names
    assert set(ready.method.state(model)) == {n for n, _ in model.named_parameters()}
    from safetensors.torch import load_file

    ready.method.save(model, loaded, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= names


def test_anchored_decay_replaces_decay_towards_zero_but_for_new_heads(tiny_recipe):
    for strength, expected in ((0.0, {"bert.": 0.1, "classifier.": 0.1}), (1.0, {"bert.": 0.0, "classifier.": 0.1})):
        ready = checking.prepare(tiny_recipe(method={"name": "full", "l2_sp": strength}))
        _, loaded = checking.load(ready)
        for group in ready.method.groups(ready.method.apply(loaded.model, loaded), loaded, 1e-3, 0.1):
            for name, parameter in group["params"]:
                decay = next(value for place, value in expected.items() if name.startswith(place))
                assert group["weight_decay"] == (decay if parameter.ndim > 1 else 0.0)
    assert "4 bytes" in " ".join(ready.method.remarks())
    assert not find.build("methods", "full", {}, Method).remarks()
    with pytest.raises(RecipeError, match="l2_sp is -1"):
        find.build("methods", "full", {"l2_sp": -1.0}, Method)
