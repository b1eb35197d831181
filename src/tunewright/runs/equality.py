"""Two models held against each other on held-out rows: every logit, the top answers, the score; one in a new process.

What was saved is proven by opening it as a user would: by its transformers class, in a process that has nothing else.
Knows run folders and tasks as contracts, not what a method is. `python -m` on this file is the new process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewright.contracts import Loaded, Precision, Prediction, Record, Task
from tunewright.data import records
from tunewright.engine.distributed import choose_device, to_device
from tunewright.engine.evaluate import overall, score_rows
from tunewright.engine.precision import compute_in
from tunewright.errors import DataError, Fault, TunewrightError
from tunewright.models.label_logits import every_logit
from tunewright.recipe import ModelSpec, Recipe
from tunewright.runs.prediction import Predictor, task_of

ROWS = 256  # held-out rows on which two models are held against each other, at most
VALUES = 2**27  # logits kept for it, 512 MB: of a large vocabulary only evenly spaced tokens are compared
Figures = dict[str, Any]


class VerificationError(TunewrightError):
    """What was written does not answer as what it was made from; `figures` say by how much."""

    def __init__(self, faults: Fault | str, figures: Figures | None = None) -> None:
        super().__init__(faults)
        self.figures = figures or {}

    def as_dict(self) -> dict[str, object]:
        return super().as_dict() | {"figures": self.figures}


# ------------------------------------------------------------------- held-out rows
def held_out(recipe: Recipe, where: Path) -> records.Data:
    """All rows of a run, split as when it trained. Raises DataError if they are gone."""
    validation = recipe.train.early_stopping_patience is not None
    data, faults = records.load(recipe.data, task_of(recipe).fields, seed=recipe.seed, validation=validation)
    if data is None:
        raise DataError([*faults, Fault("a merged model is proven on the run's held-out rows", where=str(where))])
    return data


def spread(rows: Sequence[Record], most: int = ROWS) -> list[Record]:
    """At most so many rows, evenly spaced: a file may be sorted by class."""
    return list(rows[:: math.ceil(len(rows) / most)]) if rows else []


# ------------------------------------------------------------------------- logits
@dataclass(frozen=True)
class Answers:
    """What one model said to rows: every logit that was kept, and the score that follows."""

    task: Task
    records: Sequence[Record]
    logits: Tensor  # (N, C) float32: a row a class answer, or a token
    predictions: Sequence[Prediction]


def answers_of(predictor: Predictor, rows: Sequence[Record], precision: Precision = "float32") -> Answers:
    """The logits of the model's own forward passes while the task answers `rows`, targets at hand.

    Tasks hand out scores or text; the logits are heard where they leave the model, so that this serves every task.
    """
    task, model, loaded = predictor.task, predictor.model.eval(), predictor.loaded
    device, size = next(model.parameters()).device, predictor.recipe.train.per_device_eval_batch_size
    heard: list[Tensor] = []
    room = VALUES // max(1, math.ceil(len(rows) / size))
    handle = model.register_forward_hook(
        lambda module, given, keys, found: heard.append(_kept(found, keys, room)), with_kwargs=True
    )
    predictions: list[Prediction] = []
    try:
        with torch.inference_mode(), every_logit(), _exact(device), compute_in(precision, device):
            for start in range(0, len(rows), size):
                batch = task.collate([task.encode(r, loaded) for r in rows[start : start + size]])
                predictions += task.validate(model, to_device(batch, device), loaded)
    finally:
        handle.remove()
    if not heard:
        problem = "no row gave an answer that could be compared"
        raise VerificationError(Fault(problem, remedy="The run needs held-out rows: data.test or data.holdout."))
    return Answers(task, rows, torch.cat(heard), predictions)


def _kept(found: Any, keys: dict[str, Any], room: int) -> Tensor:
    """(N, C) on the CPU: logits of real tokens, not of padding; every so many where there is no room for all."""
    logits, mask = found.logits, keys.get("attention_mask")
    if logits.ndim == 3 and mask is not None and mask.shape == logits.shape[:2]:
        logits = logits[mask == 1]
    flat = logits.reshape(-1, logits.shape[-1])
    return flat[:: math.ceil(flat.numel() / room)].float().cpu()


def _exact(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Convolutions of a GPU compute in TF32 unless told otherwise, which is ten bits of the 23."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)  # type: ignore[no-untyped-call]


def score_of(answers: Answers) -> float | None:
    """The task's first metric over the rows; None where it needs more than a forward pass."""
    task = answers.task
    return overall(task, score_rows(task, answers.predictions, answers.records)).get(task.metrics[0].name)


def differences(own: Tensor, score: float | None, other: Answers) -> Figures:
    """How far `other` is from logits `own` (N, C) and their score on the same rows, in numbers."""
    after = score_of(other)
    scores: dict[str, float | None] = {"unmerged": score, "merged": after}
    scores |= {"difference": after - score} if score is not None and after is not None else {}
    facts: Figures = {"rows": len(other.records), "metric": other.task.metrics[0].name, "score": scores}
    return facts | logit_differences(own, other.logits)


def logit_differences(own: Tensor, other: Tensor) -> Figures:
    """Largest difference, that relative to the largest own logit, and how many top-1 answers changed. (N, C) each."""
    largest, apart = float(own.abs().max()), float((own - other).abs().max())
    changed = int((own.argmax(-1) != other.argmax(-1)).sum())
    finite = math.isfinite(apart)
    return {
        "answers": len(own),
        "max_difference": apart if finite else None,  # None: not a number, which JSON cannot spell
        "max_relative_difference": apart / max(largest, 1e-30) if finite else None,
        "changed_top1": changed,
        "changed_top1_share": changed / len(own),
    }


def told(figures: Figures) -> str:
    """The figures as one sentence."""
    apart, share, score = figures["max_difference"], figures["max_relative_difference"], figures["score"]
    logits = "logits that are no numbers" if apart is None else f"largest logit difference {apart:.2g}"
    logits += "" if share is None else f" ({share:.2g} of the largest logit"
    if share is not None:
        logits += f", {figures['tolerance']:g} allowed)" if "tolerance" in figures else ")"
    kind = "rows" if figures["answers"] == figures["rows"] else "tokens"
    changed = f"the top answer changed at {figures['changed_top1']} of {figures['answers']} {kind}"
    text = f"On {figures['rows']} held-out row{'s' * (figures['rows'] != 1)}: {logits}; {changed}"
    if "difference" not in score:
        return text + "."
    return (
        f"{text}; {figures['metric']} {score['unmerged']:.4f} and {score['merged']:.4f} ({score['difference']:+.2g})."
    )


def require_equal(figures: Figures, where: str) -> None:
    """Raises VerificationError with all figures if the logits are further apart than allowed."""
    share = figures["max_relative_difference"]
    if share is None or share > figures["tolerance"]:
        problem = f"the merged model does not answer as the run does. {told(figures)}"
        remedy = "No merged model was written. If that is equal enough: --tolerance, or export.tolerance in the recipe."
        raise VerificationError(Fault(problem, where=where, remedy=remedy), figures)


# ---------------------------------------------------------------- the new process
def reloaded(folder: Path, recipe: Path, own: Answers, folded: Predictor, tolerance: float) -> Figures:
    """How far the model in `folder`, opened by a new process, is from `own`. Raises VerificationError if it fails."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_file({"logits": own.logits.contiguous()}, place / "logits.safetensors")
        asked = {
            "model": str(folder), "recipe": str(recipe), "rows": [r["row"] for r in own.records],
            "score": score_of(own), "labels": list(folded.loaded.labels), "tolerance": tolerance,
        }  # fmt: skip
        (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        if last := _new_process(place):
            problem = f"the merged model cannot be used in a new process: {last}"
            raise VerificationError(Fault(problem, where=str(folder)))
        found: Figures = json.loads((place / "found.json").read_text(encoding="utf-8"))
    if "problem" in found:
        raise VerificationError(Fault(found["problem"], where=str(folder)))
    return found


def _new_process(place: Path) -> str:
    """Answers what was asked in `place`; the last line of what went wrong, "" if nothing did."""
    # a task or method of the user's own may lie on a path that only this process knows
    paths = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "tunewright.runs.equality", str(place)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else ""


def answer(place: Path) -> None:
    """In the new process: what was asked in `place` is answered there."""
    (place / "found.json").write_text(json.dumps(_found(place)), encoding="utf-8")


def _found(place: Path) -> Figures:
    """The folder's model by its plain transformers class, on the rows asked for."""
    from safetensors.torch import load_file

    asked = json.loads((place / "asked.json").read_text(encoding="utf-8"))
    recipe = Recipe.read(asked["recipe"])[0]
    task, wanted = task_of(recipe), set(asked["rows"])
    loaded = task.load(ModelSpec(asked["model"], dtype="float32"))
    if list(loaded.labels) != asked["labels"]:
        return {"problem": f"the labels came back as {list(loaded.labels)}, and went as {asked['labels']}"}
    if lost := _open_plainly(task, loaded, Path(asked["model"])):
        return {"problem": f"weights are missing from what was saved: {', '.join(lost[:5])}"}
    rows = [r for r in held_out(recipe, Path(asked["recipe"])).test if r["row"] in wanted]
    found = answers_of(Predictor(task, loaded.model, loaded, recipe), rows)
    own = load_file(place / "logits.safetensors")["logits"]
    if own.shape != found.logits.shape:
        shapes = f"{tuple(found.logits.shape)}, not {tuple(own.shape)}"
        return {"problem": f"the saved model or its processor has changed: logits of shape {shapes}"}
    return differences(own, asked["score"], found) | {"tolerance": asked["tolerance"]}


def _open_plainly(task: Task, loaded: Loaded, folder: Path) -> Sequence[str]:
    """The model as plain transformers opens it, put in the place of ours; the names it found no weights for."""
    import transformers

    model, report = getattr(transformers, task.auto_class).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    device, _ = choose_device()
    loaded.model = model.to(device).eval()
    return sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
