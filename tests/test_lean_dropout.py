"""Dropout by a quicker draw drops as much, keeps the mean, and stands back where it has nothing to draw."""

import pytest
import torch
from torch import nn

from tunewright.models.lean_dropout import STEPS, LeanDropout, kept, make_lean_dropouts, suits


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_so_many_places_are_dropped_and_the_rest_is_scaled_to_the_same_mean(p):
    torch.manual_seed(0)
    found = kept(torch.Size((400, 1001)), p)
    share = round(p * STEPS) / STEPS
    assert abs(share - p) <= 0.5 / STEPS
    noise = 5 * (p * (1 - p) / found.numel()) ** 0.5
    assert abs(float((found == 0).float().mean()) - share) < noise
    for place in range(4):  # four places share one draw: each must be dropped as often, the signed end among them
        assert abs(float((found.flatten()[place::4] == 0).float().mean()) - share) < 2 * noise
    assert found.unique().tolist() == [0.0, pytest.approx(1 / (1 - share))]


def test_neighbours_are_drawn_apart():
    torch.manual_seed(0)
    dropped = (kept(torch.Size((400_000,)), 0.5) == 0).float()
    for distance in (1, 2, 3, 4):
        both = float((dropped[:-distance] * dropped[distance:]).mean())
        assert abs(both - 0.25) < 0.005, distance


def test_the_gradient_passes_where_the_input_did_and_a_seed_says_where():
    layer, x = LeanDropout(0.3), torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(1)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out, x * x.grad)
    torch.manual_seed(1)
    assert torch.equal(layer(x), out)
    assert 0 < int((out == 0).sum()) < out.numel()


def test_where_nothing_is_drawn_it_is_torchs_own():
    x = torch.randn(4, 6)
    assert LeanDropout(0.5).eval()(x) is x
    assert torch.equal(LeanDropout(0.0)(x), x)
    assert not LeanDropout(1.0)(x).any()
    assert [suits(x.bfloat16(), 0.1), suits(x, 1e-7), suits(x, 0.1)] == [False, False, True]
    torch.manual_seed(0)
    wanted = nn.Dropout(0.5)(x.double())
    torch.manual_seed(0)
    assert torch.equal(LeanDropout(0.5)(x.double()), wanted)


def test_plain_dropouts_of_a_model_are_found_and_others_left():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2)), Own(0.1), nn.Dropout1d(0.1))
    assert "of 2 layers" in make_lean_dropouts(model)
    assert [type(module) for module in model][2:] == [Own, nn.Dropout1d]
    assert str(model[0]) == str(nn.Dropout(0.1))
    assert make_lean_dropouts(model) == ""
