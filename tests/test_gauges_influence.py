"""Training rows that pushed an answer: the formulas against autograd and refits; planted rows that must be found."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import two_sides
from conftest import BAD, GOOD
from two_sides import mood_rows

from tunewright.contracts import Record
from tunewright.metrics import influence
from tunewright.models import tiny
from tunewright.models.pooling import HeadCall, head_calls
from tunewright.runs.evidence.flipped import flips
from tunewright.runs.evidence.gauges import influence as gauge
from tunewright.runs.evidence.sides import NotRun, Sides


def drawn(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------ formulas
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_dot_products_of_autograds_gradients(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 3, bias=bias).double()
    features, labels = drawn(5, 7), torch.tensor([0, 1, 2, 1, 0])
    gradients = []
    for f, label in zip(features, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(layer(f), label)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))]))
    stacked = torch.stack(gradients)
    errors = influence.errors(torch.softmax(layer(features), -1).detach(), labels)
    ours = influence.products(features, errors, features, errors, bias=bias)
    torch.testing.assert_close(ours, stacked @ stacked.T)


def test_the_product_of_two_texts_is_that_of_their_summed_gradients():
    one, two = (drawn(4, 6, 1), drawn(4, 9, 2)), (drawn(3, 6, 3), drawn(3, 9, 4))
    whole = [torch.einsum("td,tv->vd", features, errors) for features, errors in (one, two)]
    assert influence.token_products(one, two, bias=False) == pytest.approx(float((whole[0] * whole[1]).sum()))


def test_whitened_features_spread_alike_and_give_products_under_the_inverse_covariance():
    features = drawn(80, 5) @ drawn(5, 5, 1) + 3
    white, _ = influence.whitened(features, features, damping=1e-12)
    torch.testing.assert_close(white.T @ white / 80, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)
    centred = features - features.mean(0)
    expected = centred @ torch.linalg.inv(centred.T @ centred / 80) @ centred.T
    torch.testing.assert_close(white @ white.T, expected, atol=1e-6, rtol=1e-6)


def test_a_row_pushes_its_own_copy_with_1_and_the_copys_other_label_with_minus_1():
    features, labels = drawn(30, 4), torch.arange(30) % 2
    errors = influence.errors(torch.full((30, 2), 0.5), labels)
    values = influence.pushes(features, errors, features, errors)
    assert values.diagonal() == pytest.approx(torch.ones(30))
    assert influence.pushes(features, errors, features, -errors).diagonal() == pytest.approx(-torch.ones(30))
    assert float(values.abs().max()) <= 1 + 1e-12


def test_left_out_is_the_ridge_regression_fitted_without_the_row():
    n, width, damping = 25, 4, 0.1
    features, labels = drawn(n, width) + 2, torch.arange(n) % 3
    centred = features - features.mean(0)
    penalty = damping * n * float((centred.T @ centred / n).diagonal().mean())
    wanted = torch.nn.functional.one_hot(labels, 3).double()
    wanted = wanted - wanted.mean(0)
    expected = []
    for i in range(n):
        kept = [j for j in range(n) if j != i]
        x = torch.cat([features[kept], torch.ones(n - 1, 1)], 1)
        ridge = penalty * torch.diag(torch.tensor([1.0] * width + [0.0], dtype=torch.float64))  # the offset is free
        weights = torch.linalg.solve(x.T @ x + ridge, x.T @ wanted[kept])
        expected.append(float((torch.cat([features[i], torch.ones(1)]) @ weights)[labels[i]]))
    assert influence.left_out(features, labels, 3).tolist() == pytest.approx(expected, abs=1e-9)


def test_features_all_the_same_divide_by_nothing():
    same, labels = torch.ones(6, 3), torch.arange(6) % 2
    assert influence.left_out(same, labels, 2).isfinite().all()
    errors = influence.errors(torch.full((6, 2), 0.5), labels)
    assert influence.pushes(same, errors, same, errors).isfinite().all()


# ------------------------------------------------------------------------ what the head was given
def test_the_token_that_decides_is_the_one_whose_outputs_are_the_logits():
    given, gave = drawn(2, 15).view(2, 3, 5), drawn(2, 6, 1).view(2, 3, 2)
    call = HeadCall(given, gave, torch.stack([gave[0, 2], gave[1, 0]]), True)
    torch.testing.assert_close(call.decided_by(), torch.stack([given[0, 2], given[1, 0]]))


def test_the_heads_input_times_its_weights_are_the_logits(tmp_path):
    both = two_sides.sides("text-classification", two_sides.classifier(tmp_path))
    batch = both.task.collate([both.task.encode(r, both.loaded) for r in both.test[:4]])
    with torch.no_grad(), head_calls(both.tuned, "classifier", 2) as calls:
        logits = both.task._logits(both.tuned, batch, both.loaded)
    layer = both.tuned.classifier
    torch.testing.assert_close(layer(calls[0].decided_by()), logits)
    assert len(calls) == 1


# ------------------------------------------------------------------------ planted rows
def tuned(folder: Path, training: list[Record], test: list[Record], steps: int = 60) -> Sides:
    def tune(task, loaded):
        two_sides.step(task, loaded, training, lambda name: True, steps, 5e-3)

    return two_sides.sides("text-classification", two_sides.classifier(folder), tune, test=test, training=training)


def muddled_rows(n: int, seed: int) -> list[Record]:
    """Moods that are not said plainly: three words of one mood and one of the other, among letters."""
    rng, rows = random.Random(seed), mood_rows(n, seed)
    for row in rows:
        own, other = (BAD, GOOD) if row["label"] == "bad" else (GOOD, BAD)
        words = rng.choices(own, k=3) + rng.choices(other, k=1) + rng.sample("abcdefghijklmnop", rng.randint(2, 9))
        rng.shuffle(words)
        row["text"] = " ".join(words)
    return rows


def mislabelled(rows: list[Record], share: float, seed: int) -> tuple[list[Record], set[str]]:
    wrong = set(random.Random(seed).sample([r["row"] for r in rows], round(share * len(rows))))
    other = {"bad": "good", "good": "bad"}
    return [r | {"label": other[r["label"]]} if r["row"] in wrong else r for r in rows], wrong


def held(folder: Path, seed: int, steps: int) -> tuple[int, int]:
    """(planted label errors in the top 2 percent of the list, planted in all): 1 percent of 500 rows."""
    rows, wrong = mislabelled(muddled_rows(500, seed), 0.01, seed)
    found = gauge.measure(tuned(folder, rows, mood_rows(40, 9, "test"), steps))["suspects"]
    assert (found["n"], found["listed"], len(wrong)) == (500, 10, 5)
    return len(wrong & {row["row"] for row in found["rows"]}), len(wrong)


def test_of_1_percent_planted_label_errors_the_top_2_percent_hold_60(tmp_path):
    assert held(tmp_path, 1, 15)[0] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [15, 100])  # before and after the errors are learnt by heart
def test_so_they_do_over_many_plantings(tmp_path, steps):
    counts = [held(tmp_path / str(seed), seed, steps) for seed in range(6)]
    print(f"{steps} steps: {counts}")
    assert sum(found for found, _ in counts) >= 0.6 * sum(planted for _, planted in counts)


def test_the_planted_copy_with_the_wrong_label_is_named_first(tmp_path):
    """Rows that mean nothing else: what the model says of them it has from their copies alone."""
    rng = random.Random(3)
    odd = [" ".join(rng.sample("qrstuvwxyz0123456789", 8)) for _ in range(6)]
    test = [row | {"text": text, "label": "bad"} for row, text in zip(mood_rows(6, 5, "test"), odd, strict=True)]
    copies = [r | {"text": text, "label": "good"} for r, text in zip(mood_rows(6, 5, "copy"), odd, strict=True)]
    training = mood_rows(120, 1) + copies
    both = tuned(tmp_path, training, test + mood_rows(20, 8, "more"), 150)
    answers = {name: {"label": name, "score": 0.9, "scores": {n: 0.9 if n == name else 0.1 for n in ("bad", "good")}}
               for name in ("bad", "good")}  # fmt: skip
    both = replace(both, before=[answers[row["label"]] for row in both.test])  # a base that knows it all
    pairs = {f"test:{i + 1}": f"copy:{i + 1}" for i in range(6)}
    broken = [row for row in gauge.measure(both)["flips"] if row["row"] in pairs and row["tuned"] == "good"]
    assert len(broken) >= 3
    first = [row["pushed_by"][0] for row in broken]
    assert all(one["way"] == "toward" and one["push"] > 0 for one in first)
    assert sum(one["row"] == pairs[row["row"]] for one, row in zip(first, broken, strict=True)) >= 0.6 * len(broken)


@pytest.fixture(scope="module")
def moods(tmp_path_factory) -> Sides:
    rows, _ = mislabelled(mood_rows(60, 1), 0.1, 1)
    return tuned(tmp_path_factory.mktemp("moods"), rows, mood_rows(30, 9, "test"))


def test_the_same_sides_give_the_same_numbers_and_every_count_is_said(moods):
    found = gauge.measure(moods)
    assert json.dumps(found, allow_nan=False) == json.dumps(gauge.measure(moods))
    assert (found["n"], found["of"], found["suspects"]["n"]) == (60, 60, 60)
    assert found["limits"][0] == gauge.PROOF
    for row in found["flips"]:
        pushes = [one["push"] for one in row["pushed_by"]]
        assert all(-1 <= push <= 1 for push in pushes)
        assert [one["way"] for one in row["pushed_by"]] == ["toward" if push > 0 else "against" for push in pushes]
    assert "because" not in json.dumps(found)


def test_where_nothing_flipped_the_suspects_are_listed_all_the_same(moods):
    still = replace(moods, before=moods.after)
    found = gauge.measure(still)
    assert found["flips"] == []
    assert found["no_flips"] == "no held-out row changed sides"
    assert found["suspects"]["rows"]
    with pytest.raises(NotRun, match="changed sides"):
        flips(still, 20)


def test_broken_rows_come_first_and_leave_a_quarter_for_the_fixed(moods):
    sides = {True: {"label": "good", "score": 0.9, "scores": {"bad": 0.1, "good": 0.9}},
             False: {"label": "bad", "score": 0.8, "scores": {"bad": 0.8, "good": 0.2}}}  # fmt: skip
    right = [row["label"] == "good" for row in moods.test]
    before = [sides[r] if i < 20 else sides[not r] for i, r in enumerate(right)]  # 20 right, 10 wrong
    after = [sides[not r] if i < 20 else sides[r] for i, r in enumerate(right)]
    chosen, total = flips(replace(moods, before=before, after=after), 8)
    assert total == 30
    assert [flip.kind for flip in chosen] == ["broken"] * 6 + ["fixed"] * 2


def test_without_training_rows_or_a_head_it_does_not_run(moods):
    with pytest.raises(NotRun, match="training rows"):
        gauge.measure(replace(moods, training=()))
    bare = replace(moods.loaded, layout=replace(moods.loaded.layout, head=None))
    with pytest.raises(NotRun, match="no head"):
        gauge.measure(replace(moods, loaded=bare))


# ------------------------------------------------------------------------ models that write
@pytest.mark.parametrize("task", ["causal-lm", "sft"])
def test_of_a_model_that_writes_the_same_text_is_what_pushed_a_text_most(task, tmp_path):
    training = mood_rows(12, 1)

    def tune(task_, loaded):
        two_sides.step(task_, loaded, training, lambda name: True, 8, 1e-2)

    test = [row | {"row": f"test:{i}"} for i, row in enumerate(training[:4])]
    if task == "sft":  # answers differ in the question alone: make each answer its own
        for i, row in enumerate(training):
            answer = {"role": "assistant", "content": " ".join(row["text"].split()[:6])}
            row["conversation"] = [row["conversation"][0], answer]
            if i < 4:
                test[i]["conversation"] = row["conversation"]
    both = two_sides.sides(task, tiny.causal_lm(tmp_path), tune, test=test, training=training)
    found = gauge.measure(both)
    assert found["how"] == "last layer, token by token"
    assert "not_run" in found["suspects"]
    assert len(found["flips"]) == 4
    for row in found["flips"]:
        place = int(row["row"].partition(":")[2])
        assert row["pushed_by"][0]["row"] == training[place]["row"]
        assert row["pushed_by"][0]["push"] == pytest.approx(1, abs=1e-5)
