"""Rows of like length share a step: less padding, the same rows, the same order whatever came before."""

from __future__ import annotations

import numpy as np
import pytest

from tunewright.data.batches import Steps

SIZES = np.random.default_rng(0).geometric(0.02, 403).tolist()  # skewed, as texts are: median 35, longest 300


def steps_of(
    batch_size: int = 8, accumulation: int = 1, lengths=SIZES, share=(0, 1), seed: int = 3, tokens=None, most=None
):
    return Steps(
        [{"row": str(i)} for i in range(len(SIZES))], lambda examples: {"row": [e["row"] for e in examples]},
        lambda example, rng: example, seed=seed, batch_size=batch_size, accumulation=accumulation, epochs=2,
        max_steps=None, share=share, lengths=lengths, tokens=tokens, most=most,
    )  # fmt: skip


def rows(step) -> list[int]:
    return [int(row) for batch in step for row in batch["row"]]


def padded(steps: Steps) -> float:
    """Places of a padded batch, by the number of real tokens."""
    places = sum(len(batch["row"]) * max(SIZES[int(r)] for r in batch["row"]) for i in range(51) for batch in steps[i])
    return places / sum(SIZES)


def test_every_row_comes_once_a_pass_and_passes_differ():
    steps = steps_of()
    for epoch in (0, 1):
        seen = [row for i in range(51) for row in rows(steps[epoch * 51 + i])]
        assert sorted(seen) == list(range(len(SIZES)))
    assert {frozenset(rows(steps[i])) for i in range(51)}.isdisjoint(frozenset(rows(steps[51 + i])) for i in range(51))


def test_little_is_padded():
    assert padded(steps_of(lengths=None)) > 1.9
    assert padded(steps_of()) < 1.35


def test_a_step_is_a_function_of_seed_epoch_and_step_alone():
    forwards = steps_of()
    found = [rows(forwards[i]) for i in range(len(forwards))]
    backwards = steps_of()
    assert [rows(backwards[i]) for i in reversed(range(len(backwards)))] == found[::-1]
    assert rows(steps_of(seed=4)[0]) != found[0]


@pytest.mark.promise(5)
def test_how_a_step_is_cut_changes_none_of_its_rows():
    whole, cut = steps_of(8, 1), steps_of(2, 4)
    ranks = [steps_of(4, 1, share=(rank, 2)) for rank in (0, 1)]
    for i in (0, 7, 50, 51, 101):
        assert rows(whole[i]) == rows(cut[i])
        assert sorted(rows(whole[i])) == sorted(row for rank in ranks for row in rows(rank[i]))


def test_long_and_short_steps_come_in_no_order():
    means = [np.mean([SIZES[r] for r in rows(steps_of()[i])]) for i in range(50)]
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.4


def tokens_of(batch, *, padded: bool) -> int:
    sizes = [SIZES[int(row)] for row in batch["row"]]
    return max(sizes) * len(sizes) if padded else sum(sizes)


@pytest.mark.promise(5)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_micro_batches_are_of_like_size_and_hold_the_same_rows(padded, accumulation):
    lengths = SIZES if padded else None
    plain = steps_of(accumulation=accumulation, lengths=lengths)
    even = steps_of(accumulation=accumulation, lengths=lengths, tokens=SIZES, most=600)
    loads = []
    for i in range(len(plain)):
        assert sorted(rows(plain[i])) == sorted(rows(even[i]))
        assert all(len(batch["row"]) <= 8 for batch in even[i])
        loads += [tokens_of(batch, padded=padded) for batch in even[i]]
    largest = max(tokens_of(batch, padded=padded) for i in range(len(plain)) for batch in plain[i])
    assert max(loads) <= max(600, max(SIZES)) < 0.8 * largest
    pieces = [len(even[i]) for i in range(len(even))]
    assert sum(pieces) < 1.7 * sum(len(plain[i]) for i in range(len(plain)))  # most steps stay whole


@pytest.mark.parametrize("padded", [True, False])
def test_a_limit_of_tokens_is_kept_but_by_single_long_rows(padded):
    limited = steps_of(lengths=SIZES if padded else None, tokens=SIZES, most=200)
    assert limited.most == 200
    assert sum(len(limited[i]) for i in range(51)) > 2 * 51
    for i in range(51):
        longest = max(SIZES[row] for row in rows(limited[i]))
        assert max(tokens_of(batch, padded=padded) for batch in limited[i]) <= max(200, longest)


def test_rows_of_one_length_are_cut_by_their_number_alone():
    plain = steps_of(tokens=None, lengths=None)
    even = steps_of(tokens=[40] * len(SIZES), lengths=None, most=320)
    assert [sorted(rows([b])) for b in plain[3]] == [sorted(rows([b])) for b in even[3]]


@pytest.mark.promise(5)
def test_ranks_share_the_micro_batches_of_a_step():
    whole = steps_of(4, 2, tokens=SIZES, most=300)
    ranks = [steps_of(4, 1, share=(rank, 2), tokens=SIZES, most=300) for rank in (0, 1)]
    for i in (0, 7, 50, 51, 101):
        assert sorted(rows(whole[i])) == sorted(row for rank in ranks for row in rows(rank[i]))
