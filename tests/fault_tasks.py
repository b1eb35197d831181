"""A task that waits where a test wants to interrupt it, as anybody's `module:Name`.

WAIT_AT="loss:5:2.0:FILE": at the fifth call of `loss`, FILE is written and two seconds pass; with "busy" for the
seconds they pass in calls into torch, which Python cannot interrupt.
"""

from __future__ import annotations

import collections
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tunewright.tasks.text_classification import TextClassification

calls: collections.Counter[str] = collections.Counter()


def moment(name: str) -> None:
    """A place where a test may want the process to wait."""
    calls[name] += 1
    at, number, seconds, file = os.environ.get("WAIT_AT", ":0::").split(":", 3)
    if (name, calls[name]) != (at, int(number)):
        return
    Path(file).write_text(str(os.getpid()))
    if seconds == "busy":
        numbers = torch.ones(6000, 6000)
        for _ in range(9):
            numbers @ numbers  # one call each, of seconds
    else:
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            time.sleep(0.02)


@dataclass(frozen=True)
class Slow(TextClassification):
    def load(self, spec, labels=()):
        moment("load")
        return super().load(spec, labels)

    def loss(self, model, batch, loaded):
        if torch.is_grad_enabled():  # a step, and no question to the model before it
            moment("loss")
        return super().loss(model, batch, loaded)

    def predict(self, model, batch, loaded):
        moment("predict")
        return super().predict(model, batch, loaded)
