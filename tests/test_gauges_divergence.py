"""How far it moved: the formulas by hand and against torch, a base against itself, a wild tuning against a mild one."""

from __future__ import annotations

import pytest
import torch

from tunewright.metrics import similarity
from tunewright.models.logprob import kl_divergence


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


def test_neighbour_overlap_by_hand():
    """Directions at these angles; each one's nearest two. In the second set the last has moved beside the first."""
    angles = torch.tensor([0.0, 10.0, 21.0, 90.0, 101.0]) * torch.pi / 180
    moved = torch.tensor([0.0, 10.0, 21.0, 90.0, -5.0]) * torch.pi / 180
    sets = [torch.stack([a.cos(), a.sin()], -1) for a in (angles, moved)]
    # before: {1,2} {0,2} {1,0} {4,2} {3,2};  after: {4,1} {0,2} {1,0} {2,1} {0,1}
    assert similarity.neighbour_overlap(*sets, k=2) == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert similarity.neighbour_overlap(sets[0], 4 * sets[0], k=2) == [1.0] * 5
