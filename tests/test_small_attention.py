"""Attention with its slopes written out is torch's attention, gradients too; what it does not know it does not take."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tunewright.models import attention, lean_dropout, small_attention


def given(seed=0, keys=7):
    rng = torch.Generator().manual_seed(seed)
    sizes = [(3, 4, 5, 8), (3, 4, keys, 8), (3, 4, keys, 8)]
    # as models bring them: heads are a view into what a linear layer gave
    return [torch.randn(b, t, h, d, generator=rng).transpose(1, 2).requires_grad_() for b, h, t, d in sizes]


def padding(keys=7):
    return (torch.arange(keys) < torch.tensor([[keys], [4], [1]]))[:, None, None].expand(3, 1, 5, keys).clone()


@pytest.mark.parametrize("looks", ["everywhere", "where no padding is", "back"])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_it_is_torchs_attention_with_its_gradients(looks, scale):
    mask, causal = padding() if looks == "where no padding is" else None, looks == "back"
    found = []
    for ours in (False, True):
        q, k, v = given(keys=5 if causal else 7)
        if ours:
            assert small_attention.suits(q, k, v, mask, causal, 0.0)
            out = small_attention.attend(q, k, v, mask, causal, scale)
            assert out.is_contiguous()
        else:
            out = scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=causal).transpose(1, 2)
        by = torch.autograd.grad((out * torch.linspace(-1, 1, 8)).square().sum(), (q, k, v))
        with torch.no_grad():
            still = small_attention.attend(q, k, v, mask, causal, scale) if ours else out
        found.append([out.detach(), still.detach(), *by])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("length", [1, 512, 513])
def test_looking_back_at_any_length(length):
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, length, 2, generator=rng) for _ in range(3))
    out = small_attention.attend(q, k, v, None, True)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=5e-6)


def test_with_dropout_it_is_the_formula_with_the_places_that_were_drawn():
    q, k, v = given()
    torch.manual_seed(3)
    out = small_attention.attend(q, k, v, padding(), False, dropout=0.4)
    torch.manual_seed(3)
    kept = lean_dropout.kept(torch.Size((12, 5, 7)), 0.4).view(3, 4, 5, 7)
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~padding(), -torch.inf)
    wanted = ((scores.softmax(-1) * kept) @ v).transpose(1, 2)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=5e-6)
    ways = [torch.autograd.grad(one.square().sum(), (q, k, v)) for one in (out, wanted)]
    for got, plain in zip(*ways, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=5e-6)
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(small_attention.attend(q, k, v, padding(), False, dropout=0.4), out)


def test_a_mask_is_read_anew_when_it_changed():
    q, k, v = given()
    mask = padding()
    first = small_attention.attend(q, k, v, mask, False)
    mask[1, :, :, 3] = False
    torch.testing.assert_close(
        small_attention.attend(q, k, v, mask, False), scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    )
    assert not torch.allclose(small_attention.attend(q, k, v, mask, False), first)


def test_in_inference_mode_too():
    q, k, v = (tensor.detach() for tensor in given())
    with torch.inference_mode():
        mask = padding()
        assert small_attention.suits(q, k, v, mask, False, 0.0)
        out = small_attention.attend(q, k, v, mask, False)
        wanted = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=5e-6)


def test_what_it_does_not_know_it_does_not_take():
    q, k, v = given()
    nothing = padding()
    nothing[2, :, 1] = False
    assert not small_attention.suits(q, k, v, nothing, False, 0.0), "a token that may look at nothing"
    assert not small_attention.suits(q, k, v, padding().float(), False, 0.0)
    assert not small_attention.suits(q, k, v, None, True, 0.0)
    assert not small_attention.suits(q, k[:, :2], v[:, :2], None, False, 0.0)
    assert not small_attention.suits(q.double(), k.double(), v.double(), None, False, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not small_attention.suits(q, k, v, None, False, 0.0)


@pytest.mark.parametrize("more", [{"softcap": 1.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}])
def test_calls_that_ask_for_more_go_the_plain_way(more):
    q, k, v = given()
    assert attention._is_plain(q, k, v, None, False, {"scaling": 0.3, "dropout": 0.1})
    assert not attention._is_plain(q, k, v, None, False, {"scaling": 0.3, **more})
