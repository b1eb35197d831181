"""How far it moved: the formulas by hand and against torch, a base against itself, a wild tuning against a mild one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import two_sides
from conftest import every_cell

from tunewright.contracts import Baseline
from tunewright.metrics import similarity, statistics
from tunewright.models import tiny, weights
from tunewright.models.choices import end_logprobs
from tunewright.models.generation import sample_ids
from tunewright.models.logprob import kl_divergence
from tunewright.recipe import ModelSpec
from tunewright.runs import checking
from tunewright.runs.evidence import neutral
from tunewright.runs.evidence.gauges import divergence, probe
from tunewright.runs.evidence.sides import NotRun, Sides


def vectors(n: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------ formulas
def test_kl_is_torchs_own_kl_div_of_the_logits():
    base, tuned = vectors(30, 11), vectors(30, 11, seed=1)
    logprobs = [torch.log_softmax(x, -1) for x in (tuned, base)]
    expected = torch.nn.functional.kl_div(*logprobs, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(base, tuned), expected)


def test_equal_logits_are_exactly_no_divergence():
    logits = 30 * vectors(50, 1000)
    logits[0, 3:] = -torch.inf
    assert (kl_divergence(logits, logits.clone()) == 0).all()


def test_cka_sees_through_rotation_and_scale():
    x = vectors()
    turned = torch.linalg.qr(vectors(6, 6, seed=2)).Q
    assert similarity.linear_cka(x, x) == 1.0
    assert similarity.linear_cka(x, x @ turned) == pytest.approx(1, abs=1e-6)
    assert similarity.linear_cka(x, 7.5 * x + 3) == pytest.approx(1, abs=1e-6)
    assert similarity.linear_cka(x, vectors(seed=5)) < 0.5


def test_cka_is_the_formula_on_features():
    """|Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of centred features; ours goes by way of the Gram matrices."""
    x, y = vectors().double(), (vectors() @ vectors(6, 4, seed=3)).double() ** 2
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert similarity.linear_cka(x, y) == pytest.approx(float(expected), abs=1e-12)


def test_the_interval_of_cka_holds_it_and_closes_where_nothing_moved():
    x, y = vectors(60), vectors(60) + vectors(60, seed=4)
    value, (low, high) = similarity.cka_with_interval(x, y)
    assert low < value < high
    assert similarity.cka_with_interval(x, x) == (1.0, (1.0, 1.0))


def test_the_interval_of_cka_is_the_jackknifes_input_by_input():
    x, y = vectors(25), vectors(25) + vectors(25, seed=4)
    without = [similarity.linear_cka(*(torch.cat([v[:i], v[i + 1 :]]) for v in (x, y))) for i in range(25)]
    mean = sum(without) / 25
    half = 2.0638985616 * (24 / 25 * sum((w - mean) ** 2 for w in without)) ** 0.5  # t with 24 degrees of freedom
    value, interval = similarity.cka_with_interval(x, y)
    assert interval == pytest.approx((value - half, value + half), abs=1e-9)


def test_neighbour_overlap_by_hand():
    """Directions at these angles; each one's nearest two. In the second set the last has moved beside the first."""
    angles = torch.tensor([0.0, 10.0, 21.0, 90.0, 101.0]) * torch.pi / 180
    moved = torch.tensor([0.0, 10.0, 21.0, 90.0, -5.0]) * torch.pi / 180
    sets = [torch.stack([a.cos(), a.sin()], -1) for a in (angles, moved)]
    # before: {1,2} {0,2} {1,0} {4,2} {3,2};  after: {4,1} {0,2} {1,0} {2,1} {0,1}
    assert similarity.neighbour_overlap(*sets, k=2) == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert similarity.neighbour_overlap(sets[0], 4 * sets[0], k=2) == [1.0] * 5


# --------------------------------------------------------------------- language models
@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny.causal_lm(tmp_path_factory.mktemp("decoder"))


def entries(found: dict) -> dict:
    assert len(found["gauges"]) >= 3
    return {entry["name"]: entry for entry in found["gauges"]}


@pytest.mark.parametrize("task", ["sft", "causal-lm"])
def test_a_language_model_against_itself_has_moved_by_exactly_nothing(decoder, task):
    found = entries(divergence.measure(two_sides.sides(task, decoder)))
    assert [entry["value"] for entry in found.values()] == [0.0] * 3
    assert [entry["floor"] for entry in found.values()] == [0.0] * 3
    assert all(entry["same_next_word"] == 1 for entry in found.values())
    assert found["KL on neutral texts"]["n"] == 200
    assert found["KL on the base's own texts"]["n"] > 150


def test_the_kl_of_a_text_is_torchs_of_its_logits_one_by_one(decoder):
    both = two_sides.sides("sft", decoder, lambda task, loaded: nudge(loaded.model, 0.1))
    rows = divergence._neutral_ids(both)[:20]
    sums, counts, same = divergence.token_kl(both.base, both.tuned, rows)
    agreed = 0
    for (ids, _), nats, n in zip(rows, sums, counts, strict=True):
        with torch.no_grad():
            logits = [side(ids[None]).logits[0, :-1] for side in (both.tuned, both.base)]
        logprobs = [torch.log_softmax(one.double(), -1) for one in logits]
        expected = torch.nn.functional.kl_div(*logprobs, log_target=True, reduction="sum")
        assert (nats, n) == (pytest.approx(float(expected), rel=1e-4), len(ids) - 1)
        agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
    assert same == agreed


def nudge(model: torch.nn.Module, size: float) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * parameter.std(correction=0) * torch.randn(parameter.shape, generator=draw)


def test_the_base_draws_the_same_texts_again_and_from_its_own_distribution(decoder):
    """Of 2,000 first words, each word's share is the base's probability of it."""
    both = two_sides.sides("sft", decoder)
    one, two = (divergence._samples(both, both.base) for _ in range(2))
    assert len(one) == 200
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    drawn = sample_ids(both.base, 2, 2000, 1, 5, [])
    with torch.no_grad():
        wanted = torch.softmax(both.base(torch.tensor([[2]])).logits[0, -1], -1)
    found = torch.bincount(torch.stack(drawn)[:, 1], minlength=len(wanted)) / 2000
    assert float((found - wanted).abs().max()) < 0.03


def test_shuffled_answers_move_it_further_than_honest_ones_at_a_smaller_rate(decoder):
    rows, mixed = two_sides.mood_rows(32), two_sides.mood_rows(32)
    rng = random.Random(0)
    for row in mixed:
        wrong = " ".join(rng.choices("abcdefghijklmnop", k=4))
        row["conversation"] = [row["conversation"][0], {"role": "assistant", "content": wrong}]
    tunings = [(rows, 1e-3), (mixed, 1e-2)]
    found = []
    for some, rate in tunings:
        both = two_sides.sides(
            "sft", decoder, lambda t, m, some=some, rate=rate: two_sides.step(t, m, some, lambda n: True, 20, rate)
        )
        found.append(entries(divergence.measure(both)))
    for name in found[0]:
        honest, wild = (one[name] for one in found)
        assert 0 < honest["value"] < wild["value"], name
        assert honest["ci95"][1] < wild["ci95"][0], name
        assert honest["ci95"][0] < honest["value"] < honest["ci95"][1]


# ------------------------------------------------------------------ encoders and vision
def test_an_encoder_against_itself_has_moved_by_exactly_nothing(tmp_path):
    found = entries(divergence.measure(two_sides.sides("text-classification", two_sides.classifier(tmp_path))))
    assert [entry["value"] for entry in found.values()] == [0.0] * 4
    assert [entry["n"] for entry in found.values()] == [200, 200, 200, 60]


def test_an_encoder_that_was_nudged_harder_has_moved_further(tmp_path):
    base = two_sides.classifier(tmp_path)
    sizes = [
        entries(divergence.measure(two_sides.sides("text-classification", base, lambda t, m, s=s: nudge(m.model, s))))
        for s in (0.02, 0.3)
    ]
    for name in sizes[0]:
        small, large = (one[name]["value"] for one in sizes)
        assert small < large or (small == large == 0 and "old head" in name), name  # few labels, few flips


def test_the_pooled_states_are_the_mean_of_the_real_tokens(tmp_path):
    both = two_sides.sides("text-classification", tiny.text_encoder(tmp_path))
    rows = two_sides.mood_rows(5)
    ours = divergence._vectors(both, both.tuned, rows)
    for row, vector in zip(rows, ours, strict=True):
        ids = both.loaded.processor(row["text"], return_tensors="pt")
        with torch.no_grad():
            states = both.tuned.bert(**ids).last_hidden_state[0]
        torch.testing.assert_close(vector, states.mean(0), atol=1e-5, rtol=1e-5)


def test_pictures_show_how_far_a_vision_model_moved_and_what_its_old_head_says(tmp_path):
    rows = [{"row": "1", "where": "1", "extra": {}, "image": str(neutral.pictures(tmp_path, 1)[0]), "label": "red"}]
    (tmp_path / "base").mkdir()
    base = tiny.image_encoder(tmp_path / "base")
    colours = ("red", "blue")
    still = two_sides.sides("image-classification", base, test=rows, labels=colours)
    names = ["change of the last layer (1 - CKA)", "change of the 10 nearest neighbours"]
    names.append("change of the old head's answers")
    found = entries(divergence.measure(still))
    assert [found[name]["value"] for name in names] == [0.0, 0.0, 0.0]
    assert found["KL of the answers"]["not_run"] == "the base had no head for these labels"
    moved = two_sides.sides(
        "image-classification", base, lambda t, m: nudge(m.model, 0.5), test=rows, labels=colours, base=None
    )
    found = entries(divergence.measure(moved))
    assert all(found[name]["value"] > 0 for name in names)
    assert all(found[name]["n"] == 120 for name in names)


def test_pictures_are_always_the_same_and_all_different(tmp_path):
    (tmp_path / "again").mkdir()
    one, two = neutral.pictures(tmp_path, 12), neutral.pictures(tmp_path / "again", 12)
    assert [a.read_bytes() for a in one] == [b.read_bytes() for b in two]
    assert len({a.read_bytes() for a in one}) == 12


# --------------------------------------------------------------------------- the probe
def test_the_packaged_texts_and_questions_are_whole():
    items, texts = neutral.items(), neutral.texts()
    assert len(items) >= 300
    assert len(texts) == len(set(texts)) == 200
    for item in items:
        assert len({item["right"], *item["wrong"]}) == 4, item
        assert item.keys() == {"kind", "prompt", "right", "wrong"}


def test_an_ends_log_probability_is_the_sum_over_its_own_tokens(decoder):
    both = two_sides.sides("sft", decoder)
    tokenizer = both.loaded.processor
    with torch.inference_mode():
        found = end_logprobs(both.base, tokenizer, [("the sun", "very good"), ("bad", "day")])
        ids = tokenizer("the sun very good", return_tensors="pt")["input_ids"]
        logprob = torch.log_softmax(both.base(ids).logits[0], -1)
    expected = float(logprob[2, ids[0, 3]] + logprob[3, ids[0, 4]])
    assert found[0] == pytest.approx(expected, abs=1e-5)


def test_the_probe_counts_broken_and_fixed_by_hand(decoder, monkeypatch):
    items = [{"kind": "k", "prompt": f"p{i}", "right": "b", "wrong": ["a", "c", "d"]} for i in range(40)]
    said = [["b"] * 30 + ["a"] * 10, ["b"] * 24 + ["c"] * 6 + ["b"] * 2 + ["a"] * 8]
    monkeypatch.setattr(probe.neutral, "items", lambda: items)
    answers = iter(said)
    monkeypatch.setattr(probe, "chosen_ends", lambda *_: next(answers))
    found = probe.measure(two_sides.sides("sft", decoder))
    assert (found["broken"], found["fixed"], found["kept_right"], found["still_wrong"]) == (6, 2, 24, 8)
    assert found["ci95"] == list(statistics.tango_interval(2, 6, 40))
    assert found["above_chance"]["base"] == pytest.approx((0.75 - 0.25) / 0.75)
    assert found["base_knows"]
    assert len(found["broken_items"]) == 6


def test_the_probe_of_a_model_against_itself_breaks_nothing(decoder):
    found = probe.measure(two_sides.sides("sft", decoder))
    assert (found["n"], found["broken"], found["fixed"], found["difference"]) == (300, 0, 0, 0)


def test_an_encoder_is_not_asked_general_questions(tmp_path):
    with pytest.raises(NotRun, match="only a language model"):
        probe.measure(two_sides.sides("text-classification", two_sides.classifier(tmp_path)))


# ----------------------------------------------------------------- every task and method
def cells() -> list[tuple[str, str]]:
    found = every_cell()
    assert len(found) >= 20
    return found


@pytest.mark.parametrize(("task_name", "method_name"), cells())
def test_before_is_the_base_and_not_the_adapter_at_its_first_step(task_name, method_name, tiny_recipe, monkeypatch):
    """What adds nothing at its start has moved by exactly nothing; virtual tokens, untrained, already have."""
    texts = neutral.texts()[:20]
    monkeypatch.setattr(neutral, "texts", lambda: texts)
    monkeypatch.setattr(neutral.pictures, "__defaults__", (20,))
    monkeypatch.setattr(divergence, "SAMPLES", 20)
    monkeypatch.setattr(divergence, "DRAWN_AT_ONCE", 20)
    prepared = checking.prepare(tiny_recipe(task_name, method=method_name))
    task, loaded = checking.load(prepared)
    base = task.load(prepared.recipe.model, loaded.labels)
    weights.put(base.model, weights.weights(loaded.model))  # a new head is drawn anew by every load
    tuned = prepared.method.apply(loaded.model, loaded)
    test = prepared.data.test
    both = Sides(
        task=task, loaded=loaded, tuned=tuned, base=base.model, plain=None, baseline=Baseline("", "", lambda _: []),
        training=(), validation=(), test=test, before=(), after=(), margin=0.02, group=None, seed=0,
    )  # fmt: skip
    values = [e["value"] for e in divergence.measure(replace(both, before=[{}] * 3))["gauges"] if "not_run" not in e]
    assert len(values) >= 2
    if prepared.method.additive:
        assert values == [0.0] * len(values)
    else:
        assert min(values[:2]) > 0


def test_a_run_opened_again_asks_the_head_of_its_base_and_not_its_own(tmp_path):
    """An encoder has no head; what a finished run stands on when it is opened again is the tuned model itself."""
    base = tiny.text_encoder(tmp_path / "base")
    both = two_sides.sides("text-classification", base, lambda t, m: nudge(m.model, 0.1))
    saved = tmp_path / "saved"
    both.tuned.save_pretrained(saved)
    both.loaded.processor.save_pretrained(saved)
    again = both.task.load(ModelSpec(str(saved)))
    assert again.fresh == ()
    start = both.task.load(ModelSpec(str(base)), two_sides.MOODS)
    found = entries(
        divergence.measure(replace(both, loaded=again, tuned=again.model, base=start.model, trunk=lambda: start))
    )
    assert found["change of the old head's answers"]["not_run"] == "the base has no head of its own"
    assert found["KL of the answers"]["not_run"] == "the base had no head for these labels"
    assert found["change of the last layer (1 - CKA)"]["value"] > 0
