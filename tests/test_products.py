"""Float32 products stay float32 whoever multiplies, and small attention by products is torch's attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tunewright.engine import products
from tunewright.engine.products import choose_products
from tunewright.models import attention


@pytest.fixture(autouse=True)
def as_it_was():
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    before, own = getattr(settings, "fp32_precision", None), AttentionInterface()["sdpa"]
    yield
    if before is not None:
        settings.fp32_precision = before
    AttentionInterface.register("sdpa", own)


def test_another_processor_keeps_what_it_has(tmp_path):
    (tmp_path / "cpuinfo").write_text("vendor_id : GenuineIntel\n", encoding="utf-8")
    before, own = torch.backends.mkldnn.matmul.fp32_precision, AttentionInterface()["sdpa"]
    assert choose_products(tmp_path / "cpuinfo") == ""
    assert choose_products(tmp_path / "none") == ""
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert AttentionInterface()["sdpa"] is own


def test_fewer_bits_are_noticed_and_nothing_is_changed_then(monkeypatch):
    assert products._is_float32()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products._is_float32()
    monkeypatch.setattr(products, "_held_back", lambda path: True)
    monkeypatch.setattr(products, "_is_float32", lambda: False)
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert choose_products() == ""
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_where_it_is_chosen_it_is_float32_and_attention_follows(monkeypatch):
    monkeypatch.setattr(products, "_held_back", lambda path: not torch.cpu._is_amx_tile_supported())
    said = choose_products()
    assert (AttentionInterface()["sdpa"] is attention._by_plain_products) == bool(said)
    assert products._is_float32()


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_products_is_torchs_with_its_gradients(masked, causal, monkeypatch):
    from torch.nn.attention import SDPBackend

    rng, layer = torch.Generator().manual_seed(0), Layer()
    layer.is_causal = causal
    sizes = [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)]
    mask = torch.rand(2, 1, 9, 9, generator=rng) < 0.7
    mask |= torch.eye(9, dtype=torch.bool)
    found = []
    for function in (sdpa_attention_forward, attention._by_plain_products):
        rng.manual_seed(1)
        given = [torch.randn(size, generator=rng).requires_grad_() for size in sizes]
        out, _ = function(layer, *given, mask if masked else None, scaling=0.3)
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        found.append([out.detach(), *(tensor.grad for tensor in given)])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    asked = []
    plain = torch.nn.attention.sdpa_kernel
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kind: asked.append(kind) or plain(kind))
    attention._by_plain_products(layer, *(tensor.detach() for tensor in given), None)
    assert asked == [SDPBackend.MATH]
    monkeypatch.setattr(attention, "SMALL", 2 * 4 * 9 * 9 - 1)
    attention._by_plain_products(layer, *(tensor.detach() for tensor in given), None)
    assert len(asked) == 1, "large ones keep torch's kernel, which makes no scores"
