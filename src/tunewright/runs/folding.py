"""One run as a plain model: the method's change folded into the weights, in float32, and proven equal.

Knows run folders, tasks and methods as contracts.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tunewright.errors import Fault, MethodError
from tunewright.models import quantize
from tunewright.models.surgery import stores_half
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs import equality
from tunewright.runs.equality import Answers, Figures
from tunewright.runs.prediction import Predictor, base_of, is_whole, labels_of, method_of, open_run

Say = Callable[[str], None]


# ------------------------------------------------------------------------ folding
@dataclass(frozen=True)
class Folded:
    """A run as a plain model."""

    predictor: Predictor  # with the plain model, in float32
    own: Answers  # what the model answers before it is folded, in float32
    how: str
    as_measured: Figures | None  # how far `own` is from the run as it was scored; None where that was in float32


def fold_into(
    run: RunDir, folder: Path, *, base: str | None, tolerance: float | None, say: Say
) -> tuple[Folded, dict[str, Any]]:
    """Write a run's plain model to `folder` and prove it; what was found, ready for merge.json.

    tolerance: of the largest logit difference, relative to the largest logit; None: the recipe's.
    Raises MethodError if the method cannot be folded, VerificationError if the two differ by more.
    """
    folded = fold(run, base)
    allowed = folded.predictor.recipe.export.tolerance if tolerance is None else tolerance
    write_model(folded.predictor, folder, origin_of(run))
    figures = equality.reloaded(folder, run.path / "recipe.yaml", folded.own, folded.predictor, allowed)
    facts = {"how": folded.how, "figures": figures}
    say(folded.how)
    if folded.as_measured is not None:
        stored = folded.predictor.recipe.model.quantize or "half precision"
        say(f"Against the run as it was scored, on a base in {stored}. {equality.told(folded.as_measured)}")
        facts["as_measured"] = folded.as_measured
    equality.require_equal(figures, str(run.path))
    say(f"Equal, in a new process. {equality.told(figures)}")
    return folded, facts


def fold(run: RunDir, base: str | None) -> Folded:
    """A run's change folded into the weights. Raises MethodError if it cannot be."""
    recipe, whole = run.recipe(), is_whole(run.path / "model")
    method = method_of(recipe)
    if not method.folds and not whole:
        problem = f"{recipe.method.name} cannot be folded into the weights"
        remedy = "Use the run as it is, with its base; or train with lora or full."
        raise MethodError(Fault(problem, where=str(run.path), remedy=remedy))
    predictor = open_run(run.path, base)
    rows = equality.spread(equality.held_out(recipe, run.path).test)
    measured = None
    if recipe.model.quantize or stores_half(predictor.model):
        measured = equality.answers_of(predictor, rows, "bf16" if stores_half(predictor.model) else "float32")
    if recipe.model.quantize and not whole:
        merged, unfolded = method.merge(predictor.model), _dequantised(run, predictor, base)
    else:
        unfolded = replace(predictor, model=in_float32(predictor.model))
        merged = unfolded.model if whole else method.merge(unfolded.model)
    own = equality.answers_of(unfolded, rows)
    apart = None if measured is None else equality.differences(measured.logits, equality.score_of(measured), own)
    plain = replace(predictor, model=in_float32(merged).eval(), loaded=unfolded.loaded)
    return Folded(plain, own, _how(recipe, whole), apart)


def _how(recipe: Recipe, whole: bool) -> str:
    if whole:
        return "Copied in float32: its model/ is whole already, there is nothing to fold."
    onto = f" The {recipe.model.quantize} base was de-quantised for it, and is 32 bits a weight now."
    return f"Folded in float32: {recipe.method.name} into its base.{onto if recipe.model.quantize else ''}"


def _dequantised(run: RunDir, predictor: Predictor, base: str | None) -> Predictor:
    """The run's adapter on its base as that stands after quantising, in float32: what folding must be equal to."""
    folder, task = run.path / "model", predictor.task
    loaded = task.load(base_of(predictor.recipe, folder, base, "this run is an adapter"), labels_of(folder))
    loaded.model = in_float32(loaded.model)
    model = method_of(predictor.recipe).open(loaded, folder)
    return Predictor(task, model.to(next(predictor.model.parameters()).device).eval(), loaded, predictor.recipe)


def in_float32(model: nn.Module) -> nn.Module:
    """The same model with float32 weights; a quantised one de-quantised."""
    return (quantize.dequantized(model) if quantize.is_quantized(model) else model).float()


def write_model(predictor: Predictor, folder: Path, origin: dict[str, str]) -> None:
    """A transformers model with its processor, opened by no code of ours, and the base it came from beside it."""
    model, processor = predictor.model, predictor.loaded.processor
    model.save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)
    (folder / "base.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def origin_of(run: RunDir) -> dict[str, str]:
    """Checkpoint, revision and SHA-256 of the base that a run began with."""
    return json.loads((run.path / "model" / "base.json").read_text(encoding="utf-8"))


def export_merged(run: RunDir, tolerance: float, say: Say) -> None:
    """`merged/` of a finished run, for `export.merged: true`; left alone if it is there."""
    if (run.path / "merged").is_dir():
        return
    with all_or_nothing(run.path / "merged") as folder:
        _, facts = fold_into(run, folder, base=None, tolerance=tolerance, say=say)
        (folder / "merge.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    say(f"Merged: {run.path / 'merged'}")


@contextlib.contextmanager
def all_or_nothing(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block has ended well, and is gone if it has not."""
    beside = target.with_name(f"{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside)
        raise
    beside.rename(target)
