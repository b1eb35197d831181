"""Convolutions with channels innermost: the same losses and weights, saved and continued as if nothing had happened."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tunewright.engine import fit as engine
from tunewright.models.surgery import channels_last, plain_layout
from tunewright.runs.training import train

OPTIONS = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "precision": "float32", "logging_steps": 1}


def trained(tiny_recipe, folder, **more):
    """(losses by step, last weights, what was said)."""
    recipe = tiny_recipe("image-classification", method="full", train=OPTIONS | more)
    run = train(recipe, folder, quiet=True, say=lambda text: None)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "learning_rate" in line]
    return losses, load_file(run.path / "model" / "model.safetensors"), run.read_json("data.json")["settings"]


def test_a_run_is_the_one_with_plain_filters(tiny_recipe, tmp_path, monkeypatch):
    losses, weights, said = trained(tiny_recipe, tmp_path / "last")
    assert any("channels innermost" in line for line in said), said
    monkeypatch.setattr(engine, "channels_last", lambda model, device: "")
    plain, wanted, said = trained(tiny_recipe, tmp_path / "plain")
    assert not any("channels innermost" in line for line in said), said
    assert len(losses) == len(plain) >= 9
    assert losses == pytest.approx(plain, rel=1e-5)
    assert any(tensor.ndim == 4 for tensor in wanted.values())
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_filters_moments_and_gradients_lie_alike_and_go_back(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3))
    weight, before = net[0].weight, net[0].weight.detach().clone()
    assert channels_last(net, torch.device("cpu"))
    assert net[0].weight is weight
    assert weight.stride() == (27, 1, 9, 3)
    assert net(torch.randn(2, 3, 9, 9)).is_contiguous(memory_format=torch.channels_last)
    plain_layout(net)
    assert weight.is_contiguous()
    assert torch.equal(weight, before)


def test_a_single_convolution_and_other_devices_are_left_alone():
    patches = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(4, 4))
    assert channels_last(patches, torch.device("cpu")) == ""
    two = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 4, 3))
    assert channels_last(two, torch.device("cuda")) == ""
    assert two[0].weight.is_contiguous()


def test_moments_are_put_back_as_the_filters_lie():
    """Kernels that update everything in one pass go over memory: moments laid otherwise would meet other weights."""
    from tunewright.engine import optimizers

    def stepped(moments):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 4, 3))
        channels_last(net, torch.device("cpu"))
        groups = [{"params": list(net.named_parameters()), "lr": 0.1, "weight_decay": 0.0}]
        optimizer = optimizers.build("adamw", groups)
        for _ in range(3 if moments is None else 1):
            kept = (
                {k: v.clone() for k, v in optimizers.state_by_name(optimizer).items()},
                [p.detach().clone() for p in net.parameters()],
            )
            if moments is not None:
                optimizers.load_state(optimizer, {k: v.contiguous() for k, v in moments[0].items()})
                for p, value in zip(net.parameters(), moments[1], strict=True):
                    p.data.copy_(value)
            net(torch.ones(2, 3, 9, 9)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return kept, list(net.parameters())

    kept, wanted = stepped(None)
    _, found = stepped(kept)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
