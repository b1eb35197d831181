"""A lean norm is the model's own: values, slopes, and its own forward wherever it is not asked for slopes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from tests.test_packing import SHAPES
from tunewright.models.lean_norms import make_lean_norms


def model_of(family: str) -> nn.Module:
    name, settings = SHAPES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    return model.eval()


def check_slopes(plain: nn.Module, lean: nn.Module) -> None:
    """Loss and every slope as near to float64 as the model's own; without slopes the model's own pass, bit by bit."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(plain).double()
    losses = [model(input_ids=ids, labels=ids).loss for model in (plain, lean, exact)]
    assert abs(losses[1] - losses[0]) < 2e-6
    for loss in losses:
        loss.backward()
    for name, parameter in exact.named_parameters():
        far = (lean.get_parameter(name).grad - parameter.grad).norm() / parameter.grad.norm()
        own = (plain.get_parameter(name).grad - parameter.grad).norm() / parameter.grad.norm()
        assert far <= 4 * own + 1e-6, name
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, lean(ids).logits)
    assert {type(m).__name__ for m in plain.modules()} == {type(m).__name__ for m in lean.modules()}
    assert copy.deepcopy(lean)(ids).logits.requires_grad


@pytest.mark.parametrize(("family", "count"), [("llama", 5), ("qwen3", 9), ("gemma3", 0), ("gpt2", 0)])
def test_loss_and_every_slope_are_the_models_own(family, count):
    """Gemma's weight is 1 + w, and GPT-2's norms are layer norms: neither is taken for one of these."""
    plain, lean = model_of(family), model_of(family)
    assert make_lean_norms(lean) == count
    assert make_lean_norms(lean) == 0
    check_slopes(plain, lean)


@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_slopes_are_those_of_small_differences(size):
    norm = nn.RMSNorm(6, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
    assert make_lean_norms(norm) == 1
    x = (size * torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))).requires_grad_()
    slope = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3))
    (norm(x) * slope).sum().backward()
    exact = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    out = weight * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    (out * slope.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 / size)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def test_what_does_something_else_is_left_alone():
    class Doubled(nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class Half(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x).to(torch.bfloat16)

    layers = nn.Sequential(Doubled(8, eps=1e-6), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), Half(8, eps=1e-6))
    assert make_lean_norms(layers) == 0
