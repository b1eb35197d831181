"""Products by oneDNN: the same numbers as torch's own in float32, for every layout that autograd brings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tunewright.models import products

CAN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not CAN, reason="this torch carries no oneDNN")


def pair(layout: str, rows: int = 130, inner: int = 150, columns: int = 170) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    one, two = torch.randn(rows, inner, generator=rng), torch.randn(inner, columns, generator=rng)
    wide = torch.randn(inner, 2 * columns, generator=rng)
    return {
        "plain": (one, two),
        "second transposed": (one, two.t().contiguous().t()),
        "first transposed": (one.t().contiguous().t(), two),
        "second a slice": (one, wide[:, columns:]),
        "second a transposed slice": (one, wide.t().contiguous()[:columns].t()),
        "every second column": (one, wide[:, ::2]),
        "first one number": (torch.ones(()).expand(rows, inner), two),
        "second one number": (one, torch.ones(()).expand(inner, columns)),
    }[layout]


@needs_onednn
@pytest.mark.parametrize(
    "layout",
    ["plain", "second transposed", "first transposed", "second a slice", "second a transposed slice",
     "every second column", "first one number", "second one number"],
)  # fmt: skip
def test_products_are_float32_products_in_every_layout(layout):
    one, two = pair(layout)
    bias = torch.linspace(-1, 1, two.shape[1])
    truth = one.double() @ two.double()
    for found, wanted in [
        (products.by_onednn(one, two, None), truth), (products.by_onednn(one, two, bias), truth + bias)
    ]:  # fmt: skip
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max() + 1e-4
        assert found.dtype is torch.float32
        assert found.shape == wanted.shape


def test_only_large_products_in_float32_are_taken():
    large = torch.zeros(128, 128), torch.zeros(128, 128)
    assert products.suits(*large)
    assert not products.suits(large[0][:4], large[1])
    assert not products.suits(large[0].double(), large[1].double())
    assert not products.suits(large[0].bfloat16(), large[1].bfloat16())


def test_other_makers_keep_what_they_have(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n")
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    assert products._maker(file) == "GenuineIntel"
    assert products._maker(tmp_path / "none") == ""
    monkeypatch.setattr(products, "_maker", lambda: "GenuineIntel")
    assert products._why_not()


def test_a_self_test_that_fails_keeps_the_default(monkeypatch):
    assert products._is_exact() is CAN
    monkeypatch.setattr(products, "by_onednn", lambda one, two, bias: (one.bfloat16() @ two.bfloat16()).float())
    assert products._is_exact() is False


SCRIPT = """
import warnings
warnings.simplefilter("error")
import torch
from tunewright.models import products
products._maker = lambda: "AuthenticAMD"
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(160, 190), torch.nn.GELU(), torch.nn.Linear(190, 130, bias=False))
x = torch.randn(4, 40, 160, requires_grad=True)

def outcome():
    net.zero_grad(); x.grad = None
    out = net(x)
    out.square().mean().backward()
    with torch.inference_mode():
        again = net(x)
    half = torch.addmm(net[0].bias, x[0].detach(), net[0].weight.t(), beta=0.5, alpha=2)
    return [out.detach(), again, half, x.grad.clone(), *(p.grad.clone() for p in net.parameters())]

before, said, after = outcome(), products.use_onednn(), outcome()
taken = []
plain = products.by_onednn
products.by_onednn = lambda *given: taken.append(1) or plain(*given)
outcome()
for a, b in zip(before, after, strict=True):
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (a - b).abs().max()
    assert a.stride() == b.stride()
print(len(taken), said)
"""


@needs_onednn
def test_a_network_learns_the_same_with_exchanged_kernels():
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        pytest.skip("needs a processor with 512-bit units")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    taken, said = done.stdout.split(" ", 1)
    assert int(taken) >= 7
    assert "oneDNN" in said  # forward, inference, and backward of weights and inputs
