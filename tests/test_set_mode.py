"""Train mode stands where something trains; what has no parameters follows what is around it."""

from torch import nn

from tunewright.models.surgery import set_mode


def test_modes_follow_what_trains():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout())),
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.ReLU(), nn.Dropout())),
        nn.Sequential(shared, nn.Dropout()),
        nn.Sequential(shared),
        nn.Dropout(),
    ).requires_grad_(False)
    model[0][0].bias.requires_grad_(True)
    set_mode(model)
    assert all(m.training for m in (model, *model[0].modules(), model[4]))
    assert not any(m.training for part in model[1:4] for m in part.modules())
    shared.requires_grad_(True)
    set_mode(model)
    assert all(m.training for part in model[2:4] for m in part.modules())
    assert not any(m.training for m in model[1].modules())
    set_mode(model.requires_grad_(False))
    assert not any(m.training for m in model.modules())
    set_mode(model.requires_grad_(True), dropout=False)
    assert not any(m.training for m in model.modules())
