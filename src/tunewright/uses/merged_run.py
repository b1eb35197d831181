"""A merged model's folder filled like a run's: recipe, evidence against the base, report and card.

So `predict`, `evaluate`, `report`, `compare` and `chat` take it like any run. Knows run folders and contracts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright.contracts import Loaded, Record
from tunewright.models.surgery import count_parameters
from tunewright.recipe import ModelSpec
from tunewright.rundir import RunDir
from tunewright.runs import checking
from tunewright.runs.evidence import gather
from tunewright.runs.prediction import Predictor, open_run
from tunewright.runs.report.card import write_card
from tunewright.runs.report.page import write_report


def record(
    folder: Path,
    name: str,
    runs: Sequence[RunDir],
    prepared: checking.Prepared,
    spec: ModelSpec,
    test: Sequence[Record],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Everything of a run folder beside `model/`, the card last; returns the evidence.

    test: the first run's held-out rows that none of the merged runs trained on.
    """
    out = RunDir(folder)
    for file in ("recipe.yaml", "environment.json", "data.json"):
        if (runs[0].path / file).is_file():
            shutil.copy(runs[0].path / file, folder / file)
    if (folder / "data.json").is_file():
        data = out.read_json("data.json")
        out.write_json("data.json", data | {"notes": [*data.get("notes", []), facts["how"], *facts["notes"]]})
    predictor = open_run(folder)
    out.write_json("merge.json", facts)
    out.write_json("usage.json", _usage(name, runs, predictor, facts))
    evidence = _evidence(out, prepared, spec, test, predictor)
    evidence["cost"] = _cost(runs, predictor)
    out.write_json("evidence.json", evidence)
    write_report(folder)
    write_card(folder)
    return evidence


def _usage(name: str, runs: Sequence[RunDir], predictor: Predictor, facts: dict[str, Any]) -> dict[str, Any]:
    task, recipe = predictor.task, predictor.recipe
    processor = "AutoTokenizer" if hasattr(predictor.loaded.processor, "decode") else "AutoImageProcessor"
    methods = list(dict.fromkeys(run.recipe().method.name for run in runs))
    return {
        "load": [
            f"from transformers import {task.auto_class}, {processor}",
            f'model = {task.auto_class}.from_pretrained("model")',
            f'processor = {processor}.from_pretrained("model")',
        ],
        "predict": [f"tunewright predict {name} INPUT"],
        "library": "transformers",
        "pipeline": task.pipeline,
        "base": facts["base"],
        "labels": list(predictor.loaded.labels),
        "task": recipe.task.name,
        "method": f"{' and '.join(methods)}, merged",
        "name": name,
    }


def _evidence(
    out: RunDir, prepared: checking.Prepared, spec: ModelSpec, test: Sequence[Record], predictor: Predictor
) -> dict[str, Any]:
    """Base and merged on the held-out rows and on those of `evaluate.general`, as after training."""
    task, recipe = predictor.task, prepared.recipe
    sets = {"": list(test)} | prepared.general
    rows = [r for part in sets.values() for r in part]
    size = recipe.train.per_device_eval_batch_size
    tuned = gather.tuned_answers(task, predictor.model, predictor.loaded, rows, size, None)
    start: Loaded = task.load(spec, predictor.loaded.labels)
    baseline, base = gather.base_answers(task, spec, start, prepared.data.train, rows, size)
    answers, place = {}, 0
    for name, part in sets.items():
        end = place + len(part)
        answers[name] = gather.Answers(part, base[place:end], tuned[place:end])
        place = end
    own = answers.pop("")
    gather.write_scores(out.path, task, [("test", own), *(("general", found) for found in answers.values())])
    lines = [
        {"row": r["row"], "truth": task.truth(r), "base": b, "tuned": t}
        for r, b, t in zip(own.records, own.base, own.tuned, strict=True)
    ]
    out.write_text("predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return gather.weigh(
        task, predictor.loaded.labels, own.records, baseline, own.base, own.tuned,
        margin=recipe.evaluate.margin, group=recipe.data.group, seed=recipe.seed, general=answers,
    )  # fmt: skip


def _cost(runs: Sequence[RunDir], predictor: Predictor) -> dict[str, Any]:
    """What the merged runs cost together; merging itself takes no training."""
    costs = [run.read_json("evidence.json").get("cost", {}) for run in runs]
    together: dict[str, Any] = {"train_seconds": sum, "trainable_parameters": sum, "peak_memory_bytes": max}
    found = {key: how(cost[key] for cost in costs) for key, how in together.items() if all(key in c for c in costs)}
    return found | {"total_parameters": count_parameters(predictor.model)[1]}
