"""Public benchmarks by name, through lm-evaluation-harness where it is installed: base and tuned on the same documents.

The harness asks and scores; what it prints for one model alone is not used. Its scores of each document are paired, so
that what the tuning changed gets an interval of its own. A task is a name that the harness knows, or a task file of
yours (plain YAML: one that would run code is refused). Documents beyond the limit are left out and counted. Knows
Sides and the harness's `simple_evaluate`; no benchmark by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tunewright.metrics import statistics
from tunewright.models.generation import writes
from tunewright.runs.evidence.bases import asking, base_model
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "public benchmarks"
LIMIT = 200  # documents of each task; the first ones, as the harness counts them


def measure(sides: Sides) -> dict[str, Any]:
    """Every task and metric with base, tuned, difference, interval, and p after Holm over all of them."""
    if not sides.harness:
        raise NotRun("no benchmark named: evaluate.harness")
    if importlib.util.find_spec("lm_eval") is None:
        raise NotRun("lm-evaluation-harness is not installed: pip install 'tunewright[harness]'")
    base, sides = base_model(sides)
    if not writes(base, sides.loaded.layout.head, sides.loaded.processor):
        raise NotRun("only a language model can take them")
    found = [_asked(model, sides) for model in (base, sides.tuned)]
    lines = [line for name in found[0] for line in _paired(name, found[0][name], found[1][name])]
    if not lines:
        raise NotRun("the harness gave no scores of single documents")
    for line, p in zip(lines, statistics.holm([line["p"] for line in lines]), strict=True):
        line["p_holm"] = p
    return {"tasks": lines, "limit": LIMIT, "sentence": _sentence(lines)}


def task(name: str) -> str | dict[str, Any]:
    """What the harness is given: a name, or what a YAML file says. Raises NotRun where it cannot be read safely."""
    if not name.endswith((".yaml", ".yml")):
        return name
    try:
        read = yaml.safe_load(Path(name).read_text(encoding="utf-8"))  # refuses !function, which would run code
    except (OSError, yaml.YAMLError) as error:
        raise NotRun(f"{name} cannot be read as plain YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(read, dict):
        raise NotRun(f"{name} holds no task")
    return read


def _asked(model: nn.Module, sides: Sides) -> dict[str, dict[str, Any]]:
    """Task -> {"higher": metric -> bool, "samples": document -> metric -> score}. What it prints is left out."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with asking(model) as device, contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        spoken: Any = HFLM(pretrained=model, tokenizer=sides.loaded.processor, backend="causal",
                           batch_size=sides.batch_size, device=str(device), trust_remote_code=False)  # fmt: skip
        result = simple_evaluate(spoken, tasks=[task(name) for name in sides.harness], limit=LIMIT, bootstrap_iters=0,
                                 log_samples=True, confirm_run_unsafe_code=False)  # fmt: skip
    return {
        name: {
            "higher": result["higher_is_better"].get(name, {}),
            "of": result.get("n-samples", {}).get(name, {}).get("original", len(samples)),
            "samples": {
                (str(s["doc_id"]), s["filter"], s["doc_hash"]): {metric: s[metric] for metric in s["metrics"]}
                for s in samples
            },
        }
        for name, samples in (result or {}).get("samples", {}).items()
    }


def _paired(name: str, base: dict[str, Any], tuned: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each metric that is one number a document; the documents that both answered."""
    same = [key for key in base["samples"] if key in tuned["samples"]]
    metrics = dict.fromkeys(metric for key in same for metric in base["samples"][key])
    lines = []
    for metric in metrics:
        pairs = [(base["samples"][key].get(metric), tuned["samples"][key].get(metric)) for key in same]
        kept = [(float(a), float(b)) for a, b in pairs if _number(a) and _number(b)]
        if len(kept) < 2:
            continue
        before, after = [a for a, _ in kept], [b for _, b in kept]
        paired = statistics.compare(before, after)
        lines.append(
            {
                "task": name, "metric": metric, "n": paired.n, "of": base["of"],
                "higher_is_better": bool(base["higher"].get(metric, True)), "base": paired.base, "tuned": paired.tuned,
                "difference": paired.difference, "ci95": list(paired.ci95), "p": paired.p, "method": paired.method,
            }
        )  # fmt: skip
    return lines


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _sentence(lines: list[dict[str, Any]]) -> str:
    worse = [line for line in lines if line["p_holm"] < 0.05 and (line["difference"] < 0) == line["higher_is_better"]]
    better = [line for line in lines if line["p_holm"] < 0.05 and line not in worse]
    counted = f"{len(lines)} benchmark score{'' if len(lines) == 1 else 's'}"
    if not worse and not better:
        return f"None of {counted} changed by more than chance would."
    said = [
        f"{len(some)} became {word} ({_named(some)})" for some, word in ((worse, "worse"), (better, "better")) if some
    ]
    return f"Of {counted}, {' and '.join(said)}, Holm's correction included."


def _named(lines: list[dict[str, Any]]) -> str:
    shown = ", ".join(f"{line['task']} {line['metric']}" for line in lines[:3])
    return shown if len(lines) <= 3 else f"{shown} ..."
