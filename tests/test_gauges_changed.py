"""What changed inside: the arithmetic by hand, and planted blocks that must be found, whatever weights say."""

from __future__ import annotations

import math

import pytest
import torch

from tunewright.contracts import Layout
from tunewright.models import weights


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
