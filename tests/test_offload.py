"""Activations that wait elsewhere come back as they were; weights never leave."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.test_packing import SHAPES, model_of
from tunewright.engine import offload
from tunewright.engine.distributed import choose_device
from tunewright.errors import UserError
from tunewright.runs import checking

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")


def slopes(model, ids, asked: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(2)  # dropout
    with offload.activations_on_host(model, asked):
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_every_slope_is_the_same_to_the_bit(family, monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 1)
    carried = []
    monkeypatch.setattr(offload, "_to_host", lambda tensor: carried.append(tensor.nbytes) or tensor.clone())
    model = model_of(family, "sdpa").train()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = slopes(model, ids, False)
    assert not carried
    away = slopes(model, ids, True)
    assert sum(carried) > 0
    assert len(plain) == len(away) >= 20
    assert all(torch.equal(plain[name], away[name]) for name in plain)


def test_weights_stay_and_so_does_what_is_small(monkeypatch):
    carried = []
    monkeypatch.setattr(offload, "_to_host", lambda tensor: carried.append(tuple(tensor.shape)) or tensor.clone())
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 2))
    with offload.activations_on_host(model, True):
        model(torch.randn(100, 300)).sum().backward()
    assert carried
    assert (200, 300) not in carried
    assert (300, 200) not in carried, "the weight transposed is a view of it"
    assert set(carried) <= {(100, 300), (100, 200)}


@CPU_ONLY
def test_without_a_gpu_it_is_refused_with_what_to_do_instead(tiny_recipe):
    with pytest.raises(UserError, match=r"no GPU.*gradient_checkpointing=true"):
        checking.prepare(tiny_recipe(train={"activation_offload": True}))


def test_it_is_of_use_on_a_gpu():
    assert not offload.useless(torch.device("cuda"))
    assert bool(offload.useless(choose_device()[0])) != torch.cuda.is_available()


def test_a_recipe_that_leaves_it_out_is_the_one_it_was(tiny_recipe):
    plain = tiny_recipe()
    assert plain.digest() == tiny_recipe(train={"activation_offload": False, "torch_compile": False}).digest()
    assert plain.digest() != tiny_recipe(train={"activation_offload": True}).digest()


@pytest.mark.gpu
def test_on_a_gpu_slopes_are_equal_and_memory_is_less():
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(16) for part in (nn.Linear(256, 256), nn.GELU())]).cuda()
    x = torch.randn(16384, 256, device="cuda")
    found, peaks = [], []
    for asked in (False, True):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with offload.activations_on_host(model, asked):
            model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        peaks.append(torch.cuda.max_memory_allocated())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert peaks[1] < 0.6 * peaks[0]
