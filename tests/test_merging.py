"""Merging: the arithmetic by hand and against numpy, the proof that refuses, and whole runs from end to end."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tree, write_text_rows
from safetensors.torch import load_file

from tunewright import cli as door
from tunewright.errors import MethodError, RunError
from tunewright.methods.lora import Lora
from tunewright.models import arithmetic
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs import equality
from tunewright.runs.prediction import is_whole, open_run
from tunewright.runs.training import train
from tunewright.uses.merging import merge
from tunewright.uses.mixing import Mixture, Way, best_base_share, greedy_soup

DOCS = Path(__file__).parents[1] / "docs" / "merging.md"


# -------------------------------------------------------------------- arithmetic
def named(*values: float) -> dict[str, torch.Tensor]:
    """Four numbers in two tensors, so that nothing works tensor by tensor where it should work over all."""
    return {"a": torch.tensor([values[:1]]), "b": torch.tensor(values[1:])}


def flat(weights: dict[str, torch.Tensor]) -> list[float]:
    return [*weights["a"].flatten().tolist(), *weights["b"].tolist()]


BASE = named(10.0, 10.0, 10.0, 10.0)
ONE, TWO = named(13.0, 10.25, 8.0, 11.0), named(11.0, 6.0, 12.5, 10.5)  # changes 3 .25 -2 1  and  1 -4 2.5 .5


def test_the_changes_and_their_sum_by_hand():
    deltas = [arithmetic.changes(BASE, model) for model in (ONE, TWO)]
    assert flat(deltas[0]) == [3.0, 0.25, -2.0, 1.0]
    assert flat(arithmetic.add(BASE, deltas, [0.5, 0.5])) == [12.0, 8.125, 10.25, 10.75]


def test_the_weighted_mean_by_hand():
    assert flat(arithmetic.mean([ONE, TWO], [0.75, 0.25])) == [12.5, 9.1875, 9.125, 10.875]


def test_ties_by_hand():
    """Half stays: 3 and -2 of the one, -4 and 2.5 of the other. Signs: + - + none. Of those that agree, the mean."""
    deltas = [arithmetic.changes(BASE, model) for model in (ONE, TWO)]
    assert flat(arithmetic.trim(deltas[0], 0.5)) == [3.0, 0.0, -2.0, 0.0]
    assert flat(arithmetic.ties(BASE, deltas, [1, 1], 0.5, 1.0)) == [13.0, 6.0, 12.5, 10.0]
    # all stay: signs of 4, -3.75, .5, 1.5; the .25 and the -2 are outvoted
    assert flat(arithmetic.ties(BASE, deltas, [1, 1], 1.0, 2.0)) == [14.0, 2.0, 15.0, 11.5]
    # the first counts three times: -6 against 2.5 turns the third sign; (3 * 3 + 1) / 4 = 2.5
    assert flat(arithmetic.ties(BASE, deltas, [3, 1], 1.0, 1.0)) == [12.5, 6.0, 8.0, 10.875]


def test_ties_is_numpys_own_writing_of_the_paper():
    rng = np.random.default_rng(0)
    changes = rng.normal(size=(3, 40)).astype("float32")
    expected = np.zeros(40)
    kept = np.array([np.where(np.abs(c) >= np.sort(np.abs(c))[-8], c, 0) for c in changes])  # 20 % of 40
    for i in range(40):
        sign = np.sign(kept[:, i].sum())
        agreeing = [v for v in kept[:, i] if v * sign > 0]
        expected[i] = np.mean(agreeing) if agreeing else 0.0
    assert (expected != 0).sum() > 8
    ours = arithmetic.ties({"w": torch.zeros(40)}, [{"w": torch.tensor(c)} for c in changes], [1, 1, 1], 0.2, 1.0)
    np.testing.assert_allclose(ours["w"].numpy(), expected, atol=1e-6)


def test_trimming_counts_only_what_changed():
    """A LoRA leaves most tensors alone; their zeros must not fill up the share that is thrown away."""
    delta = {"moved": torch.tensor([4.0, -3.0, 2.0, 1.0]), "still": torch.zeros(96)}
    assert arithmetic.trim(delta, 0.5)["moved"].tolist() == [4.0, -3.0, 0.0, 0.0]
    assert arithmetic.trim({"still": torch.zeros(3)}, 0.5)["still"].tolist() == [0.0, 0.0, 0.0]


def test_dare_keeps_a_change_whole_or_not_at_all_and_its_expectation():
    delta = {"w": torch.full((20_000,), 2.0)}

    def draw(seed):
        return torch.Generator().manual_seed(seed)

    one = arithmetic.dropped(delta, 0.1, draw(0))["w"]
    assert set(one.tolist()) == {0.0, 20.0}
    assert abs(one.mean().item() - 2.0) < 0.2  # six standard errors of 0.042 would be 0.25
    assert torch.equal(one, arithmetic.dropped(delta, 0.1, draw(0))["w"])
    assert not torch.equal(one, arithmetic.dropped(delta, 0.1, draw(1))["w"])
    all_of_it = arithmetic.dare(BASE, [arithmetic.changes(BASE, ONE)], [1.0], 1.0, 1.0, [draw(0)])
    assert flat(all_of_it) == flat(ONE)


# ------------------------------------------------------------------------- mixing
def mixture(count: int = 3, seed: int = 0) -> Mixture:
    rng = torch.Generator().manual_seed(seed)

    def make(*names):
        return {name: torch.randn(5, generator=rng) for name in names}

    models = [make("w", "mean", "head") for _ in range(count)]
    return Mixture(make("w", "mean"), models, {"mean"}, [str(i) for i in range(count)])


@pytest.mark.parametrize("how", ["linear", "ties", "dare", "add"])
def test_the_order_of_runs_does_not_matter(how):
    one = mixture()
    two = dataclasses.replace(one, models=one.models[::-1], digests=one.digests[::-1])
    ways = [Way(how, weights=w, density=None if how in ("linear", "add") else 0.5) for w in ((1, 2, 3), (3, 2, 1))]
    results = [one.mix(ways[0]), two.mix(ways[1])]
    assert results[0].keys() == {"w", "mean", "head"}
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["linear", "ties", "dare", "add", "soup"])
def test_new_heads_and_statistics_are_averaged_in_every_way(how):
    made = mixture(2)
    result = made.mix(Way(how))
    for name in ("mean", "head"):
        torch.testing.assert_close(result[name], (made.models[0][name] + made.models[1][name]) / 2)
    assert not torch.equal(result["w"], made.base["w"])


@pytest.mark.parametrize("how", [None, "linear", "ties", "soup"])
def test_the_base_share_is_the_tuned_at_0_and_the_base_at_1(how):
    made = mixture(1)
    tuned, base = made.mix(Way(how, density=1.0 if how == "ties" else None)), made.mix(Way(how), [0], 1.0)
    assert all(torch.equal(tuned[name], value) for name, value in made.models[0].items())
    assert all(torch.equal(base[name], value) for name, value in made.base.items())
    assert torch.equal(base["head"], made.models[0]["head"]), "the base has none"
    between = made.mix(Way(how, density=1.0 if how == "ties" else None), [0], 0.25)["w"]
    torch.testing.assert_close(between, 0.25 * made.base["w"] + 0.75 * made.models[0]["w"])


def test_a_greedy_soup_is_never_below_its_best_run_and_leaves_out_what_hurts():
    left_out = together = 0
    for seed in range(20):
        made = mixture(4, seed)
        target = torch.randn(5, generator=torch.Generator().manual_seed(seed + 100))

        def score(weights, target=target):
            return -float((weights["w"] - target).norm())

        chosen, steps = greedy_soup(made, Way("soup"), score)
        alone = [score(model) for model in made.models]
        assert score(made.mix(Way("soup"), chosen)) >= max(alone)
        assert alone[chosen[0]] == max(alone)
        assert [s["model"] for s in steps] == sorted(range(4), key=lambda i: -alone[i])
        assert [s["model"] for s in steps if s["kept"]] == chosen
        left_out, together = left_out + (len(chosen) < 4), together + (len(chosen) > 1)
    assert left_out > 3
    assert together > 3


def test_the_best_base_share_is_the_smallest_of_equals():
    made = mixture(1)
    assert best_base_share(made, Way(), [0], lambda weights: 1.0)[0] == 0.0
    target = 0.3 * made.base["w"] + 0.7 * made.models[0]["w"]
    share, scores = best_base_share(made, Way(), [0], lambda weights: -float((weights["w"] - target).norm()))
    assert share == pytest.approx(0.3)
    assert len(scores) == 10


def test_impossible_ways_are_named_together():
    way = Way("linear", weights=(1.0,), density=2.0, scale=1.0, base_share=1.5)
    assert {f.where for f in way.faults(2)} == {"--weights", "--density", "--scale", "--base-share"}
    assert Way("soup", weights=(1.0, 1.0)).faults(2)
    assert Way("ties", weights=(-1.0, 1.0)).faults(2)
    assert Way("add", weights=(-1.0, 1.0)).faults(2) == [], "a change may be taken away"
    assert Way("dare", density=0.5, scale=2.0, base_share="auto").faults(3) == []


def test_the_door_knows_every_way():
    hint = typing.get_type_hints(Way)["how"]
    assert set(door.WAYS) == set(typing.get_args(typing.get_args(hint)[0]))


# ------------------------------------------------------------------------ figures
def test_differences_by_hand():
    own, other = torch.tensor([[1.0, -4.0], [2.0, 3.0]]), torch.tensor([[1.0, -4.5], [3.25, 3.0]])
    assert equality.logit_differences(own, other) == {
        "answers": 2, "max_difference": 1.25, "max_relative_difference": 1.25 / 4,
        "changed_top1": 1, "changed_top1_share": 0.5,
    }  # fmt: skip
    broken = equality.logit_differences(own, other * float("nan"))
    assert broken["max_difference"] is None
    with pytest.raises(equality.VerificationError, match="no numbers"):
        equality.require_equal(broken | {"rows": 2, "score": {}, "metric": "m", "tolerance": 1.0}, "here")


def test_rows_are_spread_over_a_sorted_file():
    rows = [{"row": str(i)} for i in range(1000)]
    chosen = [int(r["row"]) for r in equality.spread(rows)]
    assert 200 <= len(chosen) <= equality.ROWS
    assert chosen[-1] > 990
    assert len(equality.spread(rows[:256])) == 256


def test_logits_of_padding_are_not_compared_and_a_large_vocabulary_is_thinned():
    class Said:
        logits = torch.arange(24.0).reshape(2, 3, 4)

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert equality._kept(Said, {"attention_mask": mask}, 100)[:, 0].tolist() == [0.0, 4.0, 12.0]
    assert equality._kept(Said, {}, 12)[:, 0].tolist() == [0.0, 8.0, 16.0]


# --------------------------------------------------------------------------- runs
STEPS = {"max_steps": 12, "learning_rate": 5e-3, "precision": "float32"}
QUIET = {"quiet": True, "say": lambda text: None}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """`desk("one", method=..., seed=...)` -> a finished tiny run; all runs lie side by side and share their files."""
    root = tmp_path_factory.mktemp("desk")
    for i, name in enumerate(("train", "validation", "test")):
        write_text_rows(root / f"{name}.csv", 40, seed=i)

    def make(name: str, task: str = "text-classification", **keys) -> Path:
        if not (root / name).exists():
            tree = tiny_tree(task, root / f"files-{task}")
            if task == "text-classification":
                tree["data"] = {split: str(root / f"{split}.csv") for split in ("train", "validation", "test")}
            recipe = Recipe.of(tree | {"method": "lora", "train": STEPS} | keys)[0]
            train(recipe, root / name, **QUIET)
        return root / name

    return make


@pytest.fixture
def here(monkeypatch):
    """The proof without a new process, which takes seconds to begin."""

    def ask(place: Path) -> str:
        equality.answer(place)
        return ""

    monkeypatch.setattr(equality, "_new_process", ask)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_one_run_becomes_a_plain_model_that_answers_as_the_run_does(cli, desk, tmp_path):
    run, out = desk("one"), tmp_path / "merged"
    code, said, err = cli("merge", run, "--out", out, "--json")
    assert code == 0, err
    found = json.loads(said)
    assert found["figures"]["max_relative_difference"] < 1e-5
    assert found["figures"]["max_difference"] > 0, "two sums in another order"
    assert (found["figures"]["changed_top1"], found["figures"]["answers"], found["figures"]["rows"]) == (0, 40, 40)
    assert found["sources"][0]["sha256"]
    assert "Equal, in a new process" in err
    assert is_whole(out / "model")
    assert not is_whole(run / "model")
    for a, b in zip(lines(run), lines(out), strict=True):
        assert a["tuned"]["label"] == b["tuned"]["label"]
        assert a["tuned"]["scores"] == pytest.approx(b["tuned"]["scores"], abs=1e-5)
        assert a["base"] == b["base"]
    assert json.loads((out / "evidence.json").read_text())["measures"] == found["measures"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_merged_folder_is_taken_like_a_run(cli, desk, here, tmp_path):
    run, out = desk("one"), tmp_path / "merged"
    merge([run], out)
    code, said, _ = cli("predict", out, "sun day good", "--json")
    assert code == 0
    assert json.loads(said)[0]["label"] == json.loads(cli("predict", run, "sun day good", "--json")[1])[0]["label"]
    rows = write_text_rows(tmp_path / "new.csv", 20, seed=9)
    assert json.loads(cli("evaluate", out, rows, "--json")[1])["measures"][0]["n"] == 20
    table = json.loads(cli("compare", run, out, "--json")[1])
    assert table["runs"][1]["against_first"] == pytest.approx(0.0, abs=1e-6)
    assert cli("report", out)[0] == 0
    assert "AutoModelForSequenceClassification.from_pretrained" in (out / "README.md").read_text()
    again = merge([out], tmp_path / "again")
    assert again["how"].startswith("Copied")
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(tmp_path / "again").items())


def test_a_whole_run_is_copied_and_says_so(desk, here, tmp_path):
    run = desk("whole", method="full")
    found = merge([run], tmp_path / "out")
    assert "nothing to fold" in found["how"]
    assert found["figures"]["max_difference"] == 0.0
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(tmp_path / "out").items())


def test_linear_is_the_mean_of_the_folded_weights_and_not_of_the_factors(desk, here, tmp_path):
    one, two = desk("one"), desk("two", train=STEPS | {"learning_rate": 2e-2})
    for name, runs in {"one": [one], "two": [two], "both": [one, two]}.items():
        merge(runs, tmp_path / name, Way(weights=(0.25, 0.75)) if len(runs) > 1 else None)
    parts, both = [weights(tmp_path / name) for name in ("one", "two")], weights(tmp_path / "both")
    assert len(both) > 20
    for name, value in both.items():
        expected = 0.25 * parts[0][name].numpy().astype("float64") + 0.75 * parts[1][name].numpy().astype("float64")
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-7, rtol=1e-6)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    factors = [load_file(run / "model" / "adapter_model.safetensors") for run in (one, two)]
    a, b = (
        0.25 * factors[0][f"base_model.model.{name[:-7]}.lora_{x}.weight"]
        + 0.75 * factors[1][f"base_model.model.{name[:-7]}.lora_{x}.weight"]
        for x in "AB"
    )
    base = load_file(Path(RunDir(one).recipe().model.checkpoint) / "model.safetensors")
    by_factors = base[name.removeprefix("bert.")] + 2 * b @ a  # alpha / r is 2
    assert (by_factors - both[name]).abs().max() > 1e-5


def test_the_base_share_runs_from_the_tuned_to_the_base_bit_by_bit(desk, here, tmp_path):
    run = desk("writer", "causal-lm")
    for name, way in {"tuned": None, "none": Way(base_share=0.0), "all": Way(base_share=1.0)}.items():
        merge([run], tmp_path / name, way)
    tuned, none, all_of_it = (weights(tmp_path / name) for name in ("tuned", "none", "all"))
    base = load_file(Path(RunDir(run).recipe().model.checkpoint) / "model.safetensors")
    assert all(torch.equal(value, none[name]) for name, value in tuned.items())
    assert all(torch.equal(value, all_of_it[name]) for name, value in base.items())
    assert not all(torch.equal(value, tuned[name]) for name, value in base.items())
    for a, b in zip(lines(tmp_path / "all"), lines(run), strict=True):
        assert a["tuned"]["loss"] == pytest.approx(b["base"]["loss"], abs=1e-6)


def test_soups_and_shares_are_chosen_on_validation_rows(cli, desk, tmp_path, here):
    runs = [desk("one"), desk("two", train=STEPS | {"learning_rate": 2e-2}), desk("whole", method="full")]
    code, said, err = cli("merge", *runs, "--how", "soup", "--base-share", "auto", "--out", tmp_path / "soup", "--json")
    assert code == 0, err
    found = json.loads(said)
    assert "Greedy soup by accuracy on 40 validation rows" in err
    assert [s["run"] for s in found["soup"] if s["kept"]] == sorted(
        [s["run"] for s in found["sources"] if s["used"]], key=[s["run"] for s in found["soup"]].index
    )
    assert found["soup"][0]["alone"] == max(s["alone"] for s in found["soup"])
    assert found["base_shares"][f"{found['base_share']:g}"] == max(found["base_shares"].values())
    merge(runs[:1], tmp_path / "alone", Way("soup"))
    merge(runs[:1], tmp_path / "folded")
    folded = weights(tmp_path / "folded")
    assert all(torch.equal(value, folded[name]) for name, value in weights(tmp_path / "alone").items())


def test_a_soup_needs_rows_that_nobody_trained_or_is_tested_on(cli, desk, tmp_path, here):
    run = desk("one")
    data = {"train": str(run.parent / "train.csv"), "test": str(run.parent / "test.csv")}
    bare = desk("bare", data=data)
    code, _, err = cli("merge", bare, "--how", "soup", "--out", tmp_path / "no")
    assert code == 2
    assert "--validation FILE" in err
    for file in data.values():
        code, _, err = cli("merge", bare, "--how", "soup", "--validation", file, "--out", tmp_path / "no")
        assert code == 2
        assert "no rows to choose on" in err
    assert not (tmp_path / "no").exists()
    mixed = tmp_path / "mixed.csv"
    mixed.write_text((run.parent / "validation.csv").read_text() + "".join(
        (run.parent / "test.csv").read_text().splitlines(True)[1:6]))  # fmt: skip
    found = merge([bare], tmp_path / "yes", Way("soup"), validation=mixed)
    assert any(note.startswith("5 of 45 validation rows are left out") for note in found["notes"])


def test_rows_that_another_run_trained_on_are_not_held_out(desk, here, tmp_path):
    rows = desk("one").parent / "train.csv"
    runs = [desk(f"held{seed}", data={"train": str(rows), "holdout": 0.4}, seed=seed) for seed in (0, 1)]
    found = merge(runs, tmp_path / "out")
    test = [{line["row"] for line in lines(folder)} for folder in (*runs, tmp_path / "out")]
    assert test[2] == test[0] & test[1] < test[0]
    assert found["measures"][0]["n"] == len(test[2]) > 0
    assert any("another of these runs trained on them" in note for note in found["notes"])
    assert any(note.startswith("Warning: classifier began from random values") for note in found["notes"])
    one_seed = merge([desk("one"), desk("two", train=STEPS | {"learning_rate": 2e-2})], tmp_path / "same")
    assert not any("Warning" in note for note in one_seed["notes"])


def test_statistics_of_batch_norms_are_averaged_and_said(desk, here, tmp_path):
    steps = [STEPS | {"train_batch_norm": True, "max_steps": n} for n in (3, 12)]
    runs = [desk(f"image-{i}", "image-classification", train=train, method="full") for i, train in enumerate(steps)]
    found = merge(runs, tmp_path / "out", Way("ties"))
    assert any("statistics of normalisation layers are averaged" in note for note in found["notes"])
    name = "resnet.embedder.embedder.normalization.running_mean"
    one, two, both = (weights(folder)[name] for folder in (*runs, tmp_path / "out"))
    assert (one - two).abs().max() > 1e-4
    torch.testing.assert_close(both, (one + two) / 2)


@pytest.mark.parametrize("kept", [{"quantize": "nf4"}, {"dtype": "bfloat16"}])
def test_a_base_in_few_bits_is_folded_onto_in_float32_and_the_rest_is_said(cli, desk, here, tmp_path, kept):
    """Equal to the same weights in float32; how far that is from the run as it was scored is a number of its own."""
    if "quantize" in kept:
        pytest.importorskip("bitsandbytes")
    name = "-".join(kept.values())
    checkpoint = RunDir(desk("one")).recipe().model.checkpoint
    precision = {"precision": "bf16"} if "dtype" in kept else {}
    run = desk(name, model={"checkpoint": checkpoint, **kept}, train=STEPS | precision)
    code, said, err = cli("merge", run, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    found = json.loads(said)
    assert found["figures"]["max_relative_difference"] < 1e-5
    assert "Against the run as it was scored" in err
    assert found["as_measured"]["answers"] == 40
    if "dtype" in kept:
        assert found["as_measured"]["max_relative_difference"] > 1e-4, "bf16 keeps 8 bits"
    else:
        assert "32 bits a weight now" in err
        base = load_file(Path(checkpoint) / "model.safetensors")
        still = "embeddings.word_embeddings.weight"
        assert torch.equal(weights(tmp_path / "out")[f"bert.{still}"], base[still])
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}
    whole = merge([run], tmp_path / "base", Way(base_share=1.0))
    assert whole["figures"]["max_difference"] == 0.0


# ----------------------------------------------------------------------- refusals
def test_runs_of_two_bases_are_refused_by_both_names(cli, desk, tmp_path):
    from tunewright.models import tiny

    run, base = desk("one"), tmp_path / "other"
    base.mkdir()
    tiny.text_encoder(base, initializer_range=0.1)
    other = desk("other", model=str(base))
    code, _, err = cli("merge", run, other, "--out", tmp_path / "out")
    assert code == 2
    assert f"{other}: not the same base as {run}" in err
    digests = [RunDir(r).read_json("usage.json")["base"]["sha256"][:12] for r in (run, other)]
    assert digests[0] != digests[1]
    assert all(digest in err for digest in digests)
    assert "not the same task" in cli("merge", run, desk("writer", "causal-lm"), "--out", tmp_path / "out")[2]
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over_and_merges_are_not_merged_again(cli, desk, here, tmp_path):
    runs = [desk("one"), desk("two", train=STEPS | {"learning_rate": 2e-2})]
    merge(runs, tmp_path / "both")
    code, _, err = cli("merge", *runs, "--out", tmp_path / "both")
    assert code == 2
    assert "is there already" in err
    code, _, err = cli("merge", tmp_path / "both", runs[0], "--out", tmp_path / "more")
    assert code == 2
    assert "several runs merged already" in err


@pytest.fixture
def sabotaged(monkeypatch):
    fold = Lora.merge

    def merge_wrong(self, model):
        merged = fold(self, model)
        with torch.no_grad():
            merged.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1.0
        return merged

    monkeypatch.setattr(Lora, "merge", merge_wrong)


def test_a_fold_that_is_wrong_in_one_weight_is_refused_and_leaves_nothing(cli, desk, here, sabotaged, tmp_path):
    run = desk("one")
    code, said, err = cli("merge", run, "--out", tmp_path / "out", "--json")
    assert code == 1
    found = json.loads(said)
    assert found["error"] == "VerificationError"
    assert found["figures"]["max_relative_difference"] > found["figures"]["tolerance"] == 1e-3
    for part in ("does not answer as the run does", "largest logit difference", "top answer changed at", "accuracy"):
        assert part in err
    assert list(tmp_path.iterdir()) == []
    assert cli("merge", run, run, "--out", tmp_path / "out")[0] == 1, "every run of several is proven too"
    assert list(tmp_path.iterdir()) == []
    assert cli("merge", run, "--out", tmp_path / "out", "--tolerance", "1")[0] == 0


def test_a_saved_model_that_is_not_whole_is_refused(desk, tmp_path, monkeypatch):
    from tunewright.runs import folding

    written = folding.write_model

    def lose(predictor, folder, origin):
        from safetensors.torch import save_file

        written(predictor, folder, origin)
        kept = {n: v for n, v in load_file(folder / "model.safetensors").items() if not n.startswith("classifier")}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(folding, "write_model", lose)
    with pytest.raises(equality.VerificationError, match=r"weights are missing .* classifier"):
        merge([desk("one")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class CannotFold(Lora):
    """A method of the user's own that cannot be folded."""

    folds = False


def test_a_method_that_cannot_fold_is_refused_at_check_and_by_merge(cli, desk, tmp_path, monkeypatch):
    run = desk("one")
    tree = RunDir(run).recipe().tree() | {"method": {"name": "test_merging:CannotFold"}, "export": {"merged": True}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    code, _, err = cli("check", tmp_path / "recipe.yaml")
    assert code == 2
    assert "export.merged" in err
    assert "cannot be folded" in err
    assert cli("check", tmp_path / "recipe.yaml", "export.merged=false")[0] == 0
    monkeypatch.setattr(Lora, "folds", False)
    code, _, err = cli("merge", run, "--out", tmp_path / "out")
    assert code == 2
    assert "cannot be folded into the weights" in err
    with pytest.raises(MethodError):
        merge([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- export.merged
@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_training_leaves_a_proven_plain_model_beside_the_adapter(desk, tmp_path, task):
    import transformers

    tree = RunDir(desk("one" if task.startswith("text") else "writer", task)).recipe().tree()
    said: list[str] = []
    run = train(Recipe.of(tree | {"export": {"merged": True}})[0], tmp_path / "run", quiet=True, say=said.append)
    assert any(text.startswith("Equal, in a new process") for text in said)
    assert said[-1] == f"Merged: {run.path / 'merged'}"
    facts = json.loads((run.path / "merged" / "merge.json").read_text())
    assert facts["figures"]["max_relative_difference"] < 1e-5
    predictor = open_run(run.path)
    auto = getattr(transformers, predictor.task.auto_class)
    plain = auto.from_pretrained(run.path / "merged").eval()
    ids = torch.tensor([[2, 9, 11, 12]])
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, predictor.model.eval()(ids).logits, atol=1e-5, rtol=1e-4)
    before = (run.path / "merged" / "model.safetensors").stat().st_mtime_ns
    train(Recipe.of(tree | {"export": {"merged": True}})[0], run.path, **QUIET)
    assert (run.path / "merged" / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_is_merged_when_the_recipe_asks_later(desk, here, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(desk("one"), run)
    tree = RunDir(run).recipe().tree() | {"export": {"merged": True}}
    train(Recipe.of(tree)[0], run, **QUIET)
    assert (run / "merged" / "model.safetensors").is_file()


def test_a_failed_proof_stops_train_with_the_figures_and_keeps_the_run(cli, desk, here, sabotaged, tmp_path):
    tree = RunDir(desk("one")).recipe().tree() | {"export": {"merged": True}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    code, said, err = cli("train", tmp_path / "recipe.yaml", f"output_dir={tmp_path / 'run'}", "--json")
    assert code == 1
    assert json.loads(said)["figures"]["max_relative_difference"] > 1e-3
    assert "largest logit difference" in err
    assert RunDir(tmp_path / "run").finished
    assert "largest logit difference" in (tmp_path / "run" / "error.txt").read_text()
    assert not list((tmp_path / "run").glob("merged*"))
    assert cli("predict", tmp_path / "run", "sun")[0] == 0


# ------------------------------------------------------------------------ the page
def test_the_commands_of_the_page_run_in_their_order(cli, desk, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name, source in {"first": "one", "second": "two"}.items():
        keys = {} if source == "one" else {"train": STEPS | {"learning_rate": 2e-2}}
        shutil.copytree(desk(source, **keys), Path("runs") / name)
    write_text_rows(tmp_path / "validation.csv", 30, seed=7)
    block = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    commands = [shlex.split(line.partition("  #")[0]) for text in block for line in text.splitlines()]
    assert len([words for words in commands if words[:2] == ["tunewright", "merge"]]) >= 6
    for words in commands:
        code, _, err = cli(*words[1:])
        assert code == 0, (words, err)


def test_one_run_alone_is_no_run_folder(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        merge([tmp_path])
