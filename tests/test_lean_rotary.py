"""Lean rotary positions are the model's own: values, slopes, and its own function wherever no slope is wanted."""

from __future__ import annotations

import pytest
import torch

from tests.test_lean_norms import check_slopes, model_of
from tunewright.models.lean_rotary import make_lean_turns


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("qwen3", 2), ("gemma3", 2), ("gpt2", 0)])
def test_loss_and_every_slope_are_the_models_own(family, count):
    plain, lean = model_of(family), model_of(family)
    assert make_lean_turns(lean) == count
    assert make_lean_turns(lean) == 0
    check_slopes(plain, lean)


def test_the_lean_pass_is_taken_in_this_model_alone(monkeypatch):
    import tunewright.models.lean_rotary as rotary

    taken = []
    turn = rotary._turn
    lean, other = model_of("llama"), model_of("llama")
    make_lean_turns(lean)
    monkeypatch.setattr(rotary, "_turn", lambda *given: taken.append(1) or turn(*given))
    ids = torch.arange(3, 9)[None]
    other(ids)
    with torch.no_grad():
        lean(ids)
    assert not taken
    lean(ids)
    assert len(taken) == 4, "queries and keys of two layers"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_halves_that_differ_and_mixed_precision(precision):
    """cos and sin of both halves need not be alike; half queries by float32 positions make float32."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from tunewright.models.lean_rotary import _lean

    rng = torch.Generator().manual_seed(0)
    cos, sin = (torch.randn(2, 5, 8, generator=rng) for _ in range(2))
    given = [torch.randn(2, heads, 5, 8, generator=rng).to(precision) for heads in (4, 2)]
    slopes, found = [torch.randn(2, heads, 5, 8, generator=rng) for heads in (4, 2)], []
    for turn in (apply_rotary_pos_emb, _lean(apply_rotary_pos_emb)):
        inputs = [x.clone().requires_grad_() for x in given]
        turned = turn(*inputs, cos, sin)
        torch.autograd.backward(turned, slopes)
        found.append([*turned, *(x.grad for x in inputs)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(
            one,
            other,
            rtol=1e-6 if one.dtype == torch.float32 else 2e-2,
            atol=2e-2 if one.dtype != torch.float32 else 1e-6,
        )


def test_other_functions_of_that_name_are_left_alone():
    from transformers.models.minimax_m2.modeling_minimax_m2 import apply_rotary_pos_emb as partial

    from tunewright.models.lean_rotary import _lean, _turns_in_halves

    assert not _turns_in_halves(lambda q, k, cos, sin: (q * cos.unsqueeze(1), k * cos.unsqueeze(1)))
    assert not _turns_in_halves(lambda x, cos, sin, dim=1: x)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 5, 8, generator=rng).requires_grad_()
    cos, sin = (torch.randn(1, 5, 4, generator=rng) for _ in range(2))  # half of each head is turned
    assert all(torch.equal(a, b) for a, b in zip(_lean(partial)(q, q, cos, sin), partial(q, q, cos, sin), strict=True))
