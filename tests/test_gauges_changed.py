"""What changed inside: the arithmetic by hand, and planted blocks that must be found, whatever weights say."""

from __future__ import annotations

import copy
import json
import math
import random
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import two_sides
from conftest import tiny_tree

from tunewright.contracts import Layout
from tunewright.methods.lora import Lora
from tunewright.metrics import statistics
from tunewright.models import tiny, weights
from tunewright.recipe import ModelSpec, Recipe
from tunewright.runs import equality
from tunewright.runs.evidence import neutral
from tunewright.runs.evidence.gauges import changed
from tunewright.runs.evidence.sides import NotRun
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train
from tunewright.tasks.text_classification import TextClassification


# ------------------------------------------------------------------- the change itself
def test_the_relative_norm_of_a_change_by_hand():
    base = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.zeros(2)}
    tuned = {"a": base["a"] + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([2.0, 2.0])}
    found = weights.moved(base, tuned, ["a", "b"])
    assert found["relative_norm"] == pytest.approx(3 / 5)  # sqrt(1 + 4 + 4) / sqrt(9 + 16)
    assert (found["rank"], found["effective_rank"], found["weights"]) == (1, 1.0, 6)


def test_the_effective_rank_is_the_exponential_of_the_entropy():
    base = torch.zeros(4, 6)
    delta = torch.zeros(4, 6)
    delta[0, 0], delta[1, 1] = 3.0, 1.0
    found = weights.spectrum(base, delta)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["effective_rank"] == pytest.approx(math.exp(entropy))
    assert found["singular_values"] == pytest.approx([3.0, 1.0])
    assert found["of_rank"] == 4


@pytest.mark.parametrize("side", [64, 1100])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_low_rank_change_shows_no_more_than_its_rank(rank, side):
    draw = torch.Generator().manual_seed(rank)
    base = torch.randn(side, side, generator=draw)
    change = torch.randn(side, rank, generator=draw) @ torch.randn(rank, side, generator=draw)
    found = weights.spectrum(base, base + 0.01 * change)  # the sum rounds: the difference has all ranks
    assert found["rank"] == rank
    assert found["effective_rank"] <= rank


def test_a_large_matrix_changed_in_all_directions_shows_no_effective_rank():
    draw = torch.Generator().manual_seed(0)
    found = weights.spectrum(torch.zeros(1100, 1100), torch.randn(1100, 1100, generator=draw))
    assert "effective_rank" not in found
    assert found["singular_values"][0] == pytest.approx(2 * math.sqrt(1100), rel=0.05)


def test_every_weight_stands_in_exactly_one_part():
    blocks = tuple(f"body.layer.{i}" for i in range(14))
    names = ["body.words.weight", "body.norm.weight", *(f"{b}.weight" for b in blocks), "head.weight"]
    parts = weights.parts_of(names, Layout(blocks, "body.words", "head"))
    assert sorted(n for part in parts for n in part.names) == sorted(names)
    assert [part.name for part in parts][:3] == ["embedding", "blocks 1-2", "blocks 3-4"]
    assert [part.kind for part in parts][-2:] == ["other", "head"]
    assert len(parts) == 7 + 3


def test_blocks_of_encoder_and_decoder_are_never_joined():
    blocks = tuple(f"encoder.{i}" for i in range(7)) + tuple(f"decoder.{i}" for i in range(7))
    groups = weights.joined(blocks, 12)
    assert len(groups) == 8
    assert all(len({name.partition(".")[0] for name in group}) == 1 for group in groups)


# ------------------------------------------------------------------- planted blocks
BLOCKS = 4


def permute(model: torch.nn.Module, block: int, seed: int) -> None:
    """The hidden units of one feed-forward in another order: other weights everywhere, the same function."""
    layer = model.bert.encoder.layer[block]
    order = torch.randperm(layer.intermediate.dense.out_features, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layer.intermediate.dense.weight.copy_(layer.intermediate.dense.weight[order].clone())
        layer.intermediate.dense.bias.copy_(layer.intermediate.dense.bias[order].clone())
        layer.output.dense.weight.copy_(layer.output.dense.weight[:, order].clone())


def planted(folder: Path, seed: int) -> tuple[int, int, two_sides.Sides]:
    """Sides where block k alone was tuned and block j only looks changed; (k, j, sides)."""
    tuned, moved = random.Random(seed).sample(range(BLOCKS), 2)
    base = two_sides.classifier(folder, seed, num_hidden_layers=BLOCKS)

    def tune(task, loaded):
        place = f"{loaded.layout.blocks[tuned]}."
        two_sides.step(task, loaded, two_sides.mood_rows(64, seed), lambda n: n.startswith(place), 40, 1e-2)
        permute(loaded.model, moved, seed)

    return tuned, moved, two_sides.sides("text-classification", base, tune, seed=seed)


def names_it(folder: Path, seed: int) -> tuple[bool, bool, bool]:
    """Whether the gauge needs block k and says so, whether it ever needs j, and whether weights point at j."""
    tuned, moved, both = planted(folder, seed)
    found = changed.measure(both)
    parts = {part["name"]: part for part in found["parts"]}
    k, j = parts[f"block {tuned + 1}"], parts[f"block {moved + 1}"]
    needed = {name for name, part in parts.items() if part.get("needs", {}).get("finding") == "helps"}
    far = max(parts.values(), key=lambda part: part["moved"]["relative_norm"])
    named = needed == {k["name"]} and f"needs {k['name']} most" in found["sentence"]
    return named, j["name"] in needed or j["alone"]["finding"] != "unclear", far is j


def test_the_tuned_block_is_named_and_never_the_one_that_only_looks_changed(tmp_path):
    found = [names_it(tmp_path / str(seed), seed) for seed in range(5)]
    assert sum(named for named, _, _ in found) >= 4
    assert not any(wrong for _, wrong, _ in found)
    assert all(norm for _, _, norm in found)  # a report by norm alone would have named j


@pytest.mark.slow
def test_the_tuned_block_is_named_in_19_of_20_tunings(tmp_path):
    found = [names_it(tmp_path / str(seed), seed) for seed in range(20)]
    print(
        f"named {sum(n for n, _, _ in found)}, wrong {sum(w for _, w, _ in found)}, by norm {sum(j for *_, j in found)}"
    )
    assert sum(named for named, _, _ in found) >= 19
    assert not any(wrong for _, wrong, _ in found)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A planted run, and what the gauge found in it."""
    both = planted(tmp_path_factory.mktemp("planted"), 0)[2]
    return both, changed.measure(both)


def logits(model: torch.nn.Module, both: two_sides.Sides) -> torch.Tensor:
    batch = both.task.collate([both.task.encode(r, both.loaded) for r in both.test])
    with torch.inference_mode():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_strength_0_is_the_base_and_1_the_tuned_model(one):
    both, found = one
    bench = changed._bench(both)
    for strength, side in ((0.0, both.base), (1.0, both.tuned)):
        weights.put(bench.model, changed.at_strength(bench.base, bench.tuned, strength))
        assert float((logits(bench.model, both) - logits(side, both)).abs().max()) <= 1e-5
    assert found["whole"]["largest_gap"] == {"tuned": 0.0, "base": 0.0}
    ends = {entry["strength"]: entry["value"] for entry in found["sweep"]}
    assert (ends[0.0], ends[1.0]) == (found["whole"]["base"], found["whole"]["tuned"])
    assert len(ends) == 6


def test_all_parts_put_back_are_the_base_and_all_grafted_the_tuned_model(one):
    bench = changed._bench(one[0])
    back, grown = dict(bench.tuned), dict(bench.base)
    for part in bench.parts:
        back, grown = bench.mixed(part, bench.base, back), bench.mixed(part, bench.tuned, grown)
    assert all(back[n].equal(bench.base[n]) and grown[n].equal(bench.tuned[n]) for n in bench.base)
    assert bench.score(back) == bench.none
    assert float((logits(weights.put(bench.model, back), one[0]) - logits(one[0].base, one[0])).abs().max()) == 0


def test_the_effect_of_a_part_is_the_paired_interval_of_its_scores(one):
    """By hand: block k put back, in a model of our own, and Tango's interval of the rows that turned."""
    both, found = one
    part = max((p for p in found["parts"] if "needs" in p), key=lambda p: p["needs"]["difference"])
    model = copy.deepcopy(both.tuned)
    model.get_submodule(part["places"][0]).load_state_dict(both.base.get_submodule(part["places"][0]).state_dict())
    truth = torch.tensor([both.loaded.labels.index(r["label"]) for r in both.test])
    right = [logits(m, both).argmax(-1) == truth for m in (model, both.tuned)]
    fixed, broken = int((~right[0] & right[1]).sum()), int((right[0] & ~right[1]).sum())
    assert part["needs"]["difference"] == pytest.approx((fixed - broken) / len(truth))
    assert part["needs"]["ci95"] == pytest.approx(list(statistics.tango_interval(fixed, broken, len(truth))))
    effects = [p["needs"]["p"] for p in found["parts"] if "needs" in p]
    assert [p["needs"]["p_holm"] for p in found["parts"] if "needs" in p] == statistics.holm(effects)


def test_parts_that_stayed_have_no_effect_to_show(one):
    parts = {part["name"]: part for part in one[1]["parts"]}
    assert parts["embedding"]["moved"]["relative_norm"] == 0
    assert "needs" not in parts["embedding"]
    assert sum("needs" in part for part in parts.values()) == 2
    json.dumps(one[1], allow_nan=False)


def test_a_new_head_is_carried_over_and_said(tmp_path):
    base = tiny.text_encoder(tmp_path)
    both = two_sides.sides(
        "text-classification",
        base,
        lambda t, m: two_sides.step(t, m, two_sides.mood_rows(64), lambda n: True, 20, 1e-2),
    )
    found = changed.measure(replace(both, base=None))  # what stood for the base was a rule
    assert "classifier" in found["carried"]
    assert any("no classifier" in line for line in found["limits"])
    assert "head" not in {part["name"] for part in found["parts"]}
    assert found["whole"]["largest_gap"] == {"tuned": 0.0}


def test_a_lora_shows_no_more_directions_than_its_rank(tmp_path):
    base = two_sides.classifier(tmp_path)
    spec, task = ModelSpec(str(base)), TextClassification()
    loaded = task.load(spec, two_sides.MOODS)
    method = Lora(r=3)
    torch.manual_seed(0)
    adapted = replace(loaded, model=method.apply(loaded.model, loaded))
    rows = two_sides.mood_rows(64)
    two_sides.step(task, adapted, rows, lambda n: "lora" in n or "classifier" in n, 10, 1e-2)
    both = two_sides.sides("text-classification", base)
    found = changed.measure(
        replace(both, loaded=adapted, tuned=adapted.model, plain=lambda: method.merge(adapted.model))
    )
    blocks = [part for part in found["parts"] if part["kind"] == "block"]
    assert len(blocks) == 2
    for part in blocks:
        assert 0 < part["moved"]["effective_rank"] <= part["moved"]["rank"] <= 3
        assert len(part["moved"]["singular_values"]) <= 3


def test_rows_are_drawn_by_the_seed_where_all_of_them_are_too_many(tmp_path, monkeypatch):
    both = planted(tmp_path, 0)[2]
    monkeypatch.setattr(changed, "WORK", {"cpu": 1.0})
    with pytest.raises(NotRun, match="take too long"):
        changed.measure(both)
    monkeypatch.setattr(changed, "TOO_MUCH", 1e12)
    found = [changed.measure(both)["rows"] for _ in range(2)]
    assert found == [{"n": 40, "of": 60, "seed": 0}] * 2


def test_what_cannot_be_folded_or_has_no_rows_says_so(one):
    with pytest.raises(NotRun, match="cannot be folded"):
        changed.measure(replace(one[0], plain=None))
    with pytest.raises(NotRun, match="fewer than 15"):
        changed.measure(replace(one[0], test=one[0].test[:14]))
    with pytest.raises(NotRun, match="no weight of the base changed"):
        changed.measure(replace(one[0], plain=lambda: one[0].base))


# ------------------------------------------------------------------- strength
def swept(kept: list[float], task: list[tuple[float, float]], margin: float = 0.02) -> dict:
    """A recommendation from planted sweeps: p is small where kept skills gain; task: intervals against full."""
    sweep = []
    for strength, gain, interval in zip((0.0, 0.25, 0.5, 0.75, 1.0, 1.25), kept, task, strict=True):
        fact = {"difference": gain, "ci95": [gain - 0.01, gain + 0.01], "p": 1e-4 if abs(gain) > 0.01 else 0.9}
        sweep.append({"strength": strength, "kept": {"name": "k", **fact}, "against_full": {"ci95": list(interval)}})
    sides = SimpleNamespace(margin=margin, name="runs/a")
    return changed._recommended(SimpleNamespace(sides=sides), sweep)


def test_less_than_full_strength_is_only_recommended_where_goal_9_allows_it():
    inside, outside = (-0.015, 0.01), (-0.03, 0.01)
    gains = [0.5, 0.4, 0.3, 0.2, 0.0, -0.1]
    best = swept(gains, [outside, outside, inside, inside, inside, inside])
    assert best["strength"] == 0.5
    assert best["command"] == "tunewright merge runs/a --base-share 0.5"
    assert swept(gains, [outside] * 6)["strength"] == 1
    assert "command" not in swept(gains, [outside] * 6)
    assert swept([0.0] * 6, [inside] * 6)["strength"] == 1
    assert swept([0.2] + [0.0] * 5, [inside] * 6)["strength"] == 1  # the base itself is not the tuned model
    assert swept([0.0] * 5 + [0.2], [inside] * 6)["strength"] == 1  # nor is more than was trained


def test_without_kept_skills_full_strength_stays(one):
    assert one[1]["recommended"]["strength"] == 1
    assert "no kept skills were measured" in one[1]["recommended"]["why"]


def test_a_language_models_kept_skills_are_the_packaged_questions_or_the_users_rows(tmp_path):
    base = tiny.causal_lm(tmp_path)
    both = two_sides.sides(
        "sft", base, lambda t, m: two_sides.step(t, m, two_sides.mood_rows(32), lambda n: True, 15, 1e-2)
    )
    found = changed.measure(both)
    assert [entry["kept"]["name"] for entry in found["sweep"]] == ["general questions"] * 6
    assert {entry["kept"]["n"] for entry in found["sweep"]} == {300}
    assert found["metric"]["name"] == "loss"
    assert found["whole"]["difference"] == pytest.approx(found["whole"]["base"] - found["whole"]["tuned"])
    assert found["whole"]["difference"] > 0  # a lower loss is a gain
    assert found["whole"]["largest_gap"]["tuned"] < 1e-5
    own = changed.measure(replace(both, general={"poems": two_sides.mood_rows(20, 5)}))
    assert {(e["kept"]["name"], e["kept"]["n"]) for e in own["sweep"]} == {("poems", 20)}


def test_the_command_writes_the_very_model_that_was_scored(tmp_path, cli, monkeypatch):
    """A real run; the sweep's scores at .75 are those of what `merge --base-share 0.25` wrote."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.of(tiny_tree("text-classification", tmp_path / "tiny") | {"train": {"learning_rate": 1e-2}})[0]
    run = train(recipe, tmp_path / "run", say=lambda text: None, quiet=True)
    predictor = open_run(run.path)
    test = equality.held_out(recipe, run.path).test
    both = two_sides.sides("text-classification", Path(recipe.model.checkpoint), test=test)
    both = replace(both, loaded=predictor.loaded, tuned=predictor.model, plain=lambda: predictor.model, name="run")
    assert predictor.loaded.fresh == ()  # an opened run does not know what its base lacked: the trunk does
    both = replace(both, base=None, trunk=lambda: both.task.load(ModelSpec(recipe.model.checkpoint), two_sides.MOODS))
    monkeypatch.setattr(changed, "_finding", lambda effect, p: "helps")
    kept = changed.Kept("k", lambda model: [0.0, 1.0], 1.0, True)
    monkeypatch.setattr(changed, "_kept", lambda bench: kept)
    found = changed.measure(replace(both, margin=1.0))
    assert found["recommended"]["strength"] == 0.75
    command = shlex.split(found["recommended"]["command"])
    assert cli(*command[1:])[0] == 0
    written = open_run(tmp_path / "run-linear")
    bench = changed._bench(both)
    weights.put(bench.model, changed.at_strength(bench.base, bench.tuned, 0.75))
    ours = weights.weights(bench.model)
    theirs = weights.weights(written.model)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_vision_models_statistics_travel_with_their_part(tmp_path):
    """Convolutions and batch norms: put back part by part, the whole is the base, buffers included."""
    (tmp_path / "base").mkdir()
    base = tiny.image_encoder(tmp_path / "base")
    pictures = neutral.pictures(tmp_path, 16)
    rows = [
        {"row": str(i), "where": str(i), "extra": {}, "image": str(file), "label": ("sky", "sea", "sand")[i % 3]}
        for i, file in enumerate(pictures)
    ]

    def tune(task, loaded):
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in [*loaded.model.parameters(), *loaded.model.buffers()]:
                if value.is_floating_point():
                    value *= 1 + 0.1 * torch.rand(value.shape, generator=draw)

    both = two_sides.sides("image-classification", base, tune, test=rows, labels=("sky", "sea", "sand"))
    found = changed.measure(both)
    assert [part["kind"] for part in found["parts"]] == ["block", "block", "other", "head"]
    assert all(part["moved"]["effective_rank"] > 0 for part in found["parts"])
    assert found["whole"]["largest_gap"] == {"tuned": 0.0, "base": 0.0}
    bench = changed._bench(both)
    assert any("running_mean" in name for part in bench.parts for name in part.names)
