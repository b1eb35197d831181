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

from tunewright.recipe import Recipe
from tunewright.version import __version__

__all__ = ["Recipe", "Run", "__version__", "check", "compare", "load", "train"]

# Threads that spin while they wait made a busy two-core machine 2.5 to 5.7 times slower (docs/facts.md).
# Read by OpenMP when torch is imported, so it stands here and not in the engine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# oneDNN keeps a product for every shape it has met, with its working memory: 0.6 GB over 32 steps of packed rows, each
# of another length (docs/performance.md). The last 128 serve a step as well. Read when torch first multiplies.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


@dataclass(frozen=True)
class Run:
    """A run folder: its verdict, its evidence, its report, and its model to ask."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

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
        values = [inputs] if isinstance(inputs, str) else [str(value) for value in inputs]
        records = [single_record(predictor.task, value, str(i)) for i, value in enumerate(values, 1)]
        return as_output(records, predictor(records))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from html import escape

        return f"<p><b>{escape(self.verdict)}</b></p><p>{escape(str(self.report))}</p>"


Given = str | Path | Mapping[str, Any] | Recipe | None


def _recipe(recipe: Given, keys: Mapping[str, Any]) -> tuple[Recipe, str | None]:
    given = [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in keys.items()]
    if isinstance(recipe, (str, Path)):
        return Recipe.read(recipe, given, source="python")
    tree = recipe.tree() if isinstance(recipe, Recipe) else recipe
    return Recipe.from_keys(given, tree, name="python", source="python")


def train(
    recipe: Given = None, *, again: bool = False, allow_change: bool = False, quiet: bool = False, **keys: Any
) -> Run:
    """Train, measure, report. `recipe`: a YAML file, a mapping or a Recipe; `keys`: its keys, by their own names.

    Continues an unfinished run; `allow_change` also where rows or options of training differ from then. Raises
    tunewright.errors.UserError with all faults before the first step, and SystemExit (130, 143) when Ctrl-C or SIGTERM
    came and the step under way was saved.
    """
    from tunewright.runs.training import train as wire

    parsed, output_dir = _recipe(recipe, keys)
    out = Path(output_dir or f"runs/{parsed.digest()}").expanduser()
    return Run(wire(parsed, out, again=again, quiet=quiet, allow_change=allow_change).path)


def check(recipe: Given = None, **keys: Any) -> dict[str, Any]:
    """What `train` would do, and everything that would stop or spoil it; no step is taken."""
    from tunewright.runs.checking import check as wire

    return wire(_recipe(recipe, keys)[0])


def compare(*runs: str | Path | Run) -> dict[str, Any]:
    """Runs that share their held-out rows, side by side."""
    from tunewright.uses.comparison import compare as wire

    return wire([Path(run) for run in runs])


def load(run: str | Path | Run, base: str | None = None) -> Any:
    """A predictor that stays open: call it with records, see tunewright.runs.prediction.Predictor."""
    from tunewright.runs.prediction import open_run

    return open_run(Path(run), base)
