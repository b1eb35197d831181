"""The fused LoRA layer is peft's: outputs and gradients, and peft's own bits wherever it is not plain LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunewright.models import fused_lora
from tunewright.models.fused_lora import fuse


class Net(nn.Module):
    """Three layers that read one input, and one after them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 16, bias=bias) for _ in range(3))
        self.out = nn.Linear(48, 24, bias=bias)

    def forward(self, x):
        return self.out(torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1))


def pair(seed: int = 0, bias: bool = True, **settings) -> tuple[nn.Module, nn.Module]:
    """The same adapted net twice, the second one fused; A and B are drawn, so that B's gradient is not all there is."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "k", "v", "out"], **settings)
    plain = peft.get_peft_model(Net(bias), config)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    ours = copy.deepcopy(plain)
    assert fuse(ours) == 4
    return plain, ours


def passed(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(x)
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return out.detach(), {"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pefts(bias, settings, monkeypatch):
    plain, ours = pair(bias=bias, **settings)
    calls = []
    monkeypatch.setattr(fused_lora, "_once", lambda x, kind: calls.append(kind) or x.detach())
    (wanted, theirs), (got, mine) = passed(plain, X), passed(ours, X)
    assert calls == [torch.float32] * 4
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert mine.keys() == theirs.keys()
    assert len(theirs) == 1 + 8
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)


def test_under_autocast_it_is_as_near_to_float32_as_peft_is():
    """Roundings differ, so that single tensors are nearer here or there: all of five nets together are compared."""
    far = {"ours": 0.0, "pefts": 0.0}
    for seed in range(5):
        plain, ours = pair(seed)
        _, slopes = passed(plain, X)
        for name, model in (("ours", ours), ("pefts", plain)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out, found = passed(model, X)
            assert out.dtype == torch.bfloat16
            assert all(found[key].dtype == torch.float32 for key in slopes)
            far[name] += sum(float(((found[key] - slope).norm() / slope.norm()) ** 2) for key, slope in slopes.items())
    assert far["ours"] <= 1.25 * far["pefts"]


def test_an_input_is_cast_once_and_a_changed_one_again():
    made = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (X.clone(), X.clone()):
            made.append([fused_lora._once(given, torch.bfloat16) for _ in range(2)])
            given.add_(1)
            made[-1].append(fused_lora._once(given, torch.bfloat16))
    assert all(first is second and first is not third for first, second, third in made)
    assert not torch.equal(made[0][0], made[0][2])


def test_a_weight_that_is_replaced_is_cast_anew():
    _, ours = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, _ = passed(ours, X)
        with torch.no_grad():
            ours.base_model.model.out.base_layer.weight.zero_()
            ours.base_model.model.out.lora_B["default"].weight.zero_()
        after, _ = passed(ours, X)
    assert not torch.equal(before, after)
    bias = ours.base_model.model.out.base_layer.bias.to(torch.bfloat16)
    assert torch.equal(after, bias.expand_as(after))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_what_is_not_plain_goes_pefts_way_bit_by_bit(settings):
    plain, ours = pair(**settings)
    found = []
    for model in (plain, ours):
        torch.manual_seed(3)
        found.append(passed(model.train(), X))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_answers_switching_off_and_merging_are_pefts_bit_by_bit():
    plain, ours = pair()
    with torch.no_grad():
        assert torch.equal(plain(X), ours(X))
    with plain.disable_adapter(), ours.disable_adapter():
        assert torch.equal(plain(X), ours(X))
    assert torch.equal(plain.merge_and_unload()(X), ours.merge_and_unload()(X))


def test_a_base_that_trains_is_not_taken_for_frozen():
    plain, ours = pair()
    for model in (plain, ours):
        model.base_model.model.q.base_layer.weight.requires_grad_(True)
    (_, theirs), (_, mine) = passed(plain, X), passed(ours, X)
    name = "base_model.model.q.base_layer.weight"
    torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5)
