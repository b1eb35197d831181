"""Fine-tune any pre-trained model on your own data, and know whether it got better.

The Python face, with the words of the command line:

    import tunewright
    run = tunewright.train(model="folder-or-hub-id", task="text-classification", data="rows.csv", method="lora",
                           output_dir="runs/rows")
    print(run.verdict)
    run.predict("where is my parcel?")

Importing this does not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "check", "compare", "load", "train"]

# Threads that spin while they wait made a busy two-core machine 2.5 to 5.7 times slower (docs/facts.md).
# Read by OpenMP when torch is imported, so it stands here and not in the engine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Run:
    """A run folder: its verdict, its evidence, its report, and its model to ask."""

    path: Path

    @property
    def evidence(self) -> dict[str, Any]:
        """evidence.json."""
        return json.loads((self.path / "evidence.json").read_text(encoding="utf-8"))

    @property
    def verdict(self) -> str:
        """The verdict's sentence."""
        return self.evidence["verdict"]["sentence"]

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    def predict(self, inputs: str | Sequence[str], base: str | None = None) -> list[dict[str, Any]]:
        """Texts, or paths of pictures -> one object each. Opens the model anew at every call; `load` keeps it open."""
        from tunewright.runs.prediction import as_output, open_run, single_record

        predictor = open_run(self.path, base)
        values = [inputs] if isinstance(inputs, str) else inputs
        records = [single_record(predictor.task, value) for value in values]
        return as_output(records, predictor(records))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from html import escape

        return f"<p><b>{escape(self.verdict)}</b></p><p>{escape(str(self.report))}</p>"


def _recipe(recipe: str | Path | Mapping[str, Any] | None, keys: Mapping[str, Any]) -> tuple[Any, str | None]:
    from tunewright.recipe import Recipe

    if isinstance(recipe, (str, Path)):
        return Recipe.read(recipe, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    return Recipe.of({**(recipe or {}), **keys}, sources=dict.fromkeys(keys, "python"))


def train(
    recipe: str | Path | Mapping[str, Any] | None = None, *, again: bool = False, quiet: bool = False, **keys: Any
) -> Run:
    """Train, measure, report. `recipe`: a YAML file or a mapping; `keys`: the recipe's keys, by the same names.

    Raises tunewright.errors.UserError with all faults before the first step. Continues an unfinished run.
    """
    from tunewright.runs.training import train as wire

    parsed, output_dir = _recipe(recipe, keys)
    out = Path(output_dir or f"runs/{parsed.digest()}")
    return Run(wire(parsed, out, again=again, quiet=quiet).path)


def check(recipe: str | Path | Mapping[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """What `train` would do, and everything that would stop or spoil it; no step is taken."""
    from tunewright.runs.checking import check as wire

    return wire(_recipe(recipe, keys)[0])


def compare(*runs: str | Path) -> dict[str, Any]:
    """Runs that share their held-out rows, side by side."""
    from tunewright.uses.comparison import compare as wire

    return wire([Path(run) for run in runs])


def load(run: str | Path, base: str | None = None) -> Any:
    """A predictor that stays open: call it with records, see tunewright.runs.prediction.Predictor."""
    from tunewright.runs.prediction import open_run

    return open_run(run, base)
