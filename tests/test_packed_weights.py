"""Weights laid out beforehand give the same bits, or are not used; afterwards the layers are as they were."""

import pytest
import torch
from torch import nn

from tunewright.models import packed_weights
from tunewright.models.packed_weights import packed


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48, bias=False)).requires_grad_(False)


def by_onednn():
    """Whether products of float32 are oneDNN's as they stand, so that the bits can agree."""
    with packed([model()]) as count:
        return count == 2


@pytest.fixture
def onednn():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    taken = by_onednn() and not torch.cpu._is_amx_tile_supported()
    if not taken:
        settings.fp32_precision = before
        pytest.skip("float32 products have other bits here")
    yield
    settings.fp32_precision = before


def test_the_same_bits_for_every_shape(onednn):
    net = model()
    for shape in ((5, 9, 48), (256, 48), (33, 48), (2, 48)):
        x = torch.randn(shape)
        wanted = net(x)
        with torch.no_grad(), packed([net]) as count:
            assert count == 2
            assert torch.equal(net(x), wanted)
    assert not any("forward" in vars(module) for module in net.modules())


def test_other_calls_take_the_plain_way(onednn, monkeypatch):
    net, x = model(), torch.randn(7, 48)
    with packed([net]):
        monkeypatch.setattr(packed_weights, "_product", lambda *given: pytest.fail("gradients are wanted"))
        x.requires_grad_()
        net(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert net(x).dtype == torch.bfloat16


def test_layers_that_train_or_differ_are_left(monkeypatch):
    net = model()
    net[0].requires_grad_(True)
    with packed([net]):
        assert "forward" not in vars(net[0])
    monkeypatch.setattr(packed_weights, "_product", lambda layer, laid_out, x: layer(x) + 1e-7)
    with packed([model(), nn.Linear(3, 1), nn.Conv2d(1, 1, 1)]) as count:
        assert count == 0
