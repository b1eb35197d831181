"""A model's modules in fewer passes over memory: each file of its kind asks the module first, and says what it leaves.

Knows which kinds there are, and nothing of models.
"""

from __future__ import annotations

from torch import nn

from tunewright.models.lean_dropout import make_lean_dropouts
from tunewright.models.lean_norms import make_lean_norms
from tunewright.models.lean_rotary import make_lean_turns


def make_lean(model: nn.Module) -> list[str]:
    """Exchange what can be; sentences on what then differs from the plain way by more than rounding."""
    make_lean_norms(model)
    make_lean_turns(model)
    return list(filter(None, [make_lean_dropouts(model)]))
