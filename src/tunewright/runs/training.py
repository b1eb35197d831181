"""train(recipe): the one wire that knows the floors below. Recipe in, run folder out.

check -> folder -> base -> fit -> model/ -> evidence on the test rows, opened once -> gauges -> report and card,
written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tunewright.contracts import Baseline, Callback, Loaded, Method, State, Task
from tunewright.data.batches import Examples
from tunewright.engine import callbacks as watching
from tunewright.engine import distributed, memory
from tunewright.engine.compiling import Worth, clock_of
from tunewright.engine.distributed import choose_device, choose_threads, from_first, is_first, peak_memory
from tunewright.engine.evaluate import overall, predict_rows, score_rows
from tunewright.engine.fit import Workplace, fit
from tunewright.engine.interruption import handled
from tunewright.engine.keeping import is_full, megabytes
from tunewright.engine.precision import choose_precision
from tunewright.errors import Fault, RunError, TrainError, TunewrightError
from tunewright.models import vocabulary
from tunewright.models.surgery import count_parameters
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir, fresh_path
from tunewright.runs import checking
from tunewright.runs.evidence import gather, gauging
from tunewright.runs.evidence.verdict import visible_sentence
from tunewright.runs.folding import export_merged
from tunewright.runs.report.card import write_card
from tunewright.runs.report.page import write_report
from tunewright.version import __version__

Say = Callable[[str], None]


def train(
    recipe: Recipe,
    out: Path,
    *,
    again: bool = False,
    allow_change: bool = False,
    callbacks: Sequence[Callback] = (),
    say: Say = lambda text: print(text, file=sys.stderr),
    quiet: bool = False,
) -> RunDir:
    """Train, measure and report; continue where a killed run stopped; leave a finished one alone.

    Raises UserError for everything that is wrong with recipe, data, base or folder, before the first step, and
    Interrupted when SIGTERM or SIGINT came and the step under way was saved.
    Under `torchrun` all ranks train and answer test rows; the first one speaks and writes.
    """
    distributed.join()
    if not is_first():
        say, quiet, callbacks = _silent, True, ()
    try:
        with handled():
            return _start(recipe, out, again, allow_change, callbacks, say, quiet)
    except Exception as error:
        told = distributed.farewell(error)
        if told is error:
            raise
        raise told from error


def _silent(text: str) -> None:
    """What the ranks after the first have to say."""


def _start(
    recipe: Recipe, out: Path, again: bool, allow_change: bool, callbacks: Sequence[Callback], say: Say, quiet: bool
) -> RunDir:
    if again and from_first(out.exists):
        out = from_first(lambda: fresh_path(out))
        say(f"A fresh folder: {out}")
    prepared = checking.prepare(recipe)
    run = from_first(lambda: RunDir.create(out, recipe, allow_change))
    _same_data(run, prepared, allow_change, say)
    if finished := from_first(lambda: run.finished):
        say(f"{run.path} is finished and left as it is; --again trains anew in a fresh folder.")
        if not recipe.export.merged:
            return run
    with run.locked() if is_first() else contextlib.nullcontext():
        try:
            if is_first():
                (run.path / "error.txt").unlink(missing_ok=True)
            if not finished:
                _train(run, prepared, callbacks, say, quiet)
            if recipe.export.merged:
                from_first(lambda: export_merged(run, recipe.export.tolerance, say))
        except Exception as error:
            told = distributed.farewell(_in_words(run, error))
            if is_first():
                text = str(told) if isinstance(told, TunewrightError) else traceback.format_exc()
                with contextlib.suppress(OSError):  # on a full disk the message on stderr must do
                    (run.path / "error.txt").write_text(text + "\n", encoding="utf-8")
            if told is error:
                raise
            raise told from error
    return run


def _same_data(run: RunDir, prepared: checking.Prepared, allow_change: bool, say: Say) -> None:
    """A recipe names places, not contents: where those have changed, this is another experiment."""
    if not (run.path / "data.json").is_file():
        return
    before = {(file["split"], file["sha256"]) for file in run.read_json("data.json")["files"]}
    now = prepared.data.facts["files"]
    if changed := [file["file"] for file in now if (file["split"], file["sha256"]) not in before]:
        if allow_change:
            say(f"Other data than at the start of this run, as allowed: {', '.join(changed)}.")
            return
        remedy = "Choose another output_dir, --again for a fresh folder beside it, or --allow-change."
        raise RunError(Fault(f"began with other data: {', '.join(changed)} differs", str(run.path), remedy=remedy))


def _same_base(run: RunDir, loaded: Loaded) -> None:
    if not (run.path / "data.json").is_file():
        return
    before = run.read_json("data.json").get("base_sha256")
    if before not in (None, loaded.origin["sha256"]):
        remedy = "Choose another output_dir, or --again for a fresh folder beside it."
        raise RunError(Fault("began with another base: its weights differ", str(run.path), remedy=remedy))


def _train(run: RunDir, prepared: checking.Prepared, callbacks: Sequence[Callback], say: Say, quiet: bool) -> None:
    recipe, data, method = prepared.recipe, prepared.data, prepared.method
    place = _workplace(run, recipe, say)
    task, loaded = checking.load(prepared)
    _same_base(run, loaded)
    steps = checking.planned_steps(prepared, task, loaded)
    chosen = [*checking.settings(prepared, steps), *checking.cut_sentence(prepared, task, loaded)]
    for sentence in (*data.notes, *loaded.notes, *chosen, visible_sentence(len(data.test), task.metrics[0])):
        say(sentence)
    if is_first():
        facts = data.facts | checking.lengths(steps.examples) | {"settings": [*loaded.notes, *chosen]}
        facts["base_sha256"] = loaded.origin["sha256"]
        run.write_json("data.json", facts)
        own_rate = {"train.learning_rate": chosen[0]} if recipe.train.learning_rate is None else {}
        options = {"task": dataclasses.asdict(prepared.task), "method": dataclasses.asdict(method)}
        run.write_text("recipe.yaml", recipe.text(own_rate, options))

    began, known = time.perf_counter(), len(loaded.notes)
    log = watching.Log(run, recipe.train.logging_steps, say)
    watchers = [log, watching.Suspicion(say), watching.Progress(quiet), *callbacks]
    watchers += [Worth(say, clock_of(place.device))] * recipe.train.torch_compile
    watchers = watchers if is_first() else []
    state, model = fit(
        task, method, loaded, steps, recipe.train, run, digest=recipe.digest(), workplace=place,
        evaluate=_validation(task, loaded, prepared), callbacks=watchers, seed=recipe.seed, say=say,
    )  # fmt: skip
    if later := loaded.notes[known:]:  # what the method chose when it saw the rows
        for sentence in later:
            say(sentence)
        if is_first():
            run.write_json("data.json", facts | {"settings": [*facts["settings"], *later]})
    if state.stop:
        say(state.stop)
    seconds = state.seconds or time.perf_counter() - began
    if is_first():
        _save_model(run, task, method, model, loaded, recipe)
    baseline = None
    if not from_first((run.path / "evidence.json").is_file):  # the test rows are opened once
        baseline, answers = _answers(task, model, loaded, prepared, quiet)
        if is_first():
            evidence = _evidence(run, task, loaded, prepared, baseline, answers)
            evidence["cost"] = _cost(model, state, seconds, place)
            _write_solved(run, state)
            run.write_json("evidence.json", evidence)
    if is_first():
        ground = _ground(run, task, method, loaded, model, prepared, baseline)
        gauging.measure_missing(ground, say, quick=recipe.evaluate.quick)
        write_report(run.path)
        run.sync()  # the card says that the run is finished
        write_card(run.path)
    verdict = from_first(lambda: run.read_json("evidence.json")["verdict"])  # the others wait here for the files
    say(f"\n{verdict['sentence']}\nReport: {run.path / 'report.html'}")


# --------------------------------------------------------------------- before
def _workplace(run: RunDir, recipe: Recipe, say: Say) -> Workplace:
    """Device, threads and precision: chosen at the first start, taken from the record afterwards."""
    stored = from_first(lambda: _stored(run))
    if stored.get("ranks", distributed.size()) != distributed.size():
        raise RunError(
            Fault(
                f"this run began with {stored['ranks']} processes, so that its steps hold other rows",
                where=str(run.path),
                got=f"{distributed.size()} now",
                remedy=f"torchrun --nproc_per_node {stored['ranks']} -m tunewright train ..., or --again.",
            )
        )
    device, why_device = choose_device()
    if stored and stored["device"] != device.type:
        say(f"This run began on {stored['device']} and continues on {device.type}: its last digits will differ.")
        stored = {}
    threads, why_threads = choose_threads(stored.get("threads"))
    torch.set_num_threads(threads)
    precision, why = choose_precision(recipe.train.precision, device, stored.get("precision"))
    say(f"Device {device.type} ({why_device}), {threads} threads ({why_threads}), precision {precision} ({why}).")
    allocator = memory.keep_pages()
    # asked of the installation, not of the library: importing peft takes three seconds that most methods can do without
    versions = {"torch": torch.__version__} | {name: metadata.version(name) for name in ("transformers", "peft")}
    changed = [f"{name} {stored[name]}, now {now}" for name, now in versions.items() if stored.get(name, now) != now]
    if changed:
        say(f"This run began with {', '.join(changed)}: its end may differ from an uninterrupted one.")
    if not stored:
        stored = {
            "tunewright": __version__, "python": platform.python_version(), **versions,
            "platform": platform.platform(), "device": device.type, "device_name": why_device, "threads": threads,
            "precision": precision, "precision_reason": why, "allocator": allocator, "seed": recipe.seed,
            "ranks": distributed.size(), **_commit(),
        }  # fmt: skip
        if is_first():
            run.write_json("environment.json", stored)
    return Workplace(device, precision)


def _stored(run: RunDir) -> dict[str, Any]:
    file = run.path / "environment.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _commit() -> dict[str, str]:
    """The commit of the folder the user works in, if there is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def _validation(task: Task, loaded: Loaded, prepared: checking.Prepared) -> Callable[[Any], dict[str, float]] | None:
    records = prepared.data.validation
    if not records:
        return None
    examples = Examples(records, lambda r: task.encode(r, loaded))
    size = prepared.recipe.train.per_device_eval_batch_size

    def evaluate(model: Any) -> dict[str, float]:
        return overall(
            task,
            score_rows(task, predict_rows(task, model, loaded, examples, batch_size=size, validating=True), records),
        )

    return evaluate


# ---------------------------------------------------------------------- after
def _save_model(run: RunDir, task: Task, method: Method, model: Any, loaded: Loaded, recipe: Recipe) -> None:
    try:
        with run.whole_folder("model") as folder:
            method.save(model, loaded, folder)
            _forget_bits(folder / "config.json")
            if not method.standalone:
                vocabulary.describe_base(folder / "config.json", loaded)
            (folder / "base.json").write_text(json.dumps(loaded.origin, indent=1) + "\n", encoding="utf-8")
    except Exception as error:
        if not is_full(error):
            raise
        raise _no_room(run, "model/", sum(p.numel() * p.element_size() for p in model.parameters())) from error
    run.write_json("usage.json", _usage(run, task, method, loaded, recipe))


def _library(folder: Path) -> str:
    """Who reads an adapter: peft, or nobody but the lines of the card."""
    return "peft" if (folder / "adapter_config.json").is_file() else "pytorch"


def _forget_bits(config: Path) -> None:
    """An adapter's config.json describes the base as it is stored: few bits are a way of loading it."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.pop("quantization_config", None):
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in_words(run: RunDir, error: Exception) -> Exception:
    """The error to tell: what the machine lacks is no fault of ours, and is said in a sentence."""
    if isinstance(error, TunewrightError):
        return error
    if is_full(error):
        return _no_room(run, "what was being written", 2**20)
    if memory.is_out(error):
        got, remedy = memory.first_line(error), f"Lower train.per_device_train_batch_size. {memory.LESS}"
        return TrainError(Fault("memory does not reach", str(run.path), got=got, remedy=remedy))
    return error


def _no_room(run: RunDir, what: str, needed: int) -> TrainError:
    free = shutil.disk_usage(run.path).free
    problem = f"the disk is full: {what} needs up to {megabytes(needed)}, {megabytes(free)} are free"
    remedy = "Make room and give the same command again: it continues from the last checkpoint, nothing is lost."
    return TrainError(Fault(problem, where=str(run.path), remedy=remedy))


def _answers(
    task: Task, model: Any, loaded: Loaded, prepared: checking.Prepared, quiet: bool
) -> tuple[Baseline, dict[str, gather.Answers]]:
    """Base and tuned on the test rows, under "", and on each set of general rows, under its name; on all ranks."""
    from tqdm import tqdm

    recipe, data = prepared.recipe, prepared.data
    sets = {"": data.test} | prepared.general
    rows = [row for records in sets.values() for row in records]
    size = recipe.train.per_device_eval_batch_size
    with tqdm(total=len(rows), desc="held-out rows", unit="row", leave=False, disable=quiet, file=sys.stderr) as bar:
        tuned = gather.tuned_answers(task, model, loaded, rows, size, bar.update)
    baseline, base = gather.base_answers(task, recipe.model, loaded, data.train, rows, size)
    answers, place = {}, 0
    for name, records in sets.items():
        end = place + len(records)
        answers[name] = gather.Answers(records, base[place:end], tuned[place:end])
        place = end
    return baseline, answers


def _evidence(
    run: RunDir,
    task: Task,
    loaded: Loaded,
    prepared: checking.Prepared,
    baseline: Baseline,
    answers: dict[str, gather.Answers],
) -> dict[str, Any]:
    recipe, data = prepared.recipe, prepared.data
    base, tuned = answers[""].base, answers[""].tuned
    general = {name: found for name, found in answers.items() if name}
    parts = [("test", answers[""]), *(("general", found) for found in general.values())]
    gather.write_scores(run.path, task, parts)
    lines = [
        {"row": r["row"], "truth": task.truth(r), "base": b, "tuned": t}
        for r, b, t in zip(data.test, base, tuned, strict=True)
    ]
    run.write_text("predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return gather.weigh(
        task, loaded.labels, data.test, baseline, base, tuned,
        margin=recipe.evaluate.margin, group=recipe.data.group, seed=recipe.seed, general=general,
    )  # fmt: skip


def _ground(
    run: RunDir,
    task: Task,
    method: Method,
    loaded: Loaded,
    model: Any,
    prepared: checking.Prepared,
    baseline: Baseline | None,
) -> gauging.Ground:
    recipe, data = prepared.recipe, prepared.data
    return gauging.Ground(
        run, recipe, task, method, loaded, model, whole=False, spec=recipe.model, training=data.train,
        validation=data.validation, test=data.test, general=prepared.general, baseline=baseline,
    )  # fmt: skip


def _cost(model: Any, state: State, seconds: float, place: Workplace) -> dict[str, Any]:
    trainable, total = count_parameters(model)
    cost = {
        "train_seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(place.device),
        "trainable_parameters": trainable,
        "total_parameters": total,
    }
    return cost | ({"items_per_second": round(state.seen / seconds, 3)} if state.seen and seconds else {})


def _write_solved(run: RunDir, state: State) -> None:
    if state.stop and not state.total:
        run.write_json("solved.json", {"text": state.stop})


def _usage(run: RunDir, task: Task, method: Method, loaded: Loaded, recipe: Recipe) -> dict[str, Any]:
    """How to load the result without us; the report and the card print these lines, and a test runs them."""
    processor = "AutoTokenizer" if hasattr(loaded.processor, "decode") else "AutoImageProcessor"
    auto = task.auto_class
    origin = loaded.origin
    if method.standalone:
        lines = [
            f"from transformers import {auto}, {processor}",
            f'model = {auto}.from_pretrained("model")',
            f'processor = {processor}.from_pretrained("model")',
        ]
    else:
        revision = f', revision="{origin["revision"]}"' if origin["revision"] else ""
        before, after = loaded.helpers.get("loading", ((), ()))
        lines = [
            f"from transformers import AutoConfig, {auto}, {processor}",
            *before,
            'config = AutoConfig.from_pretrained("model")',
            f'base = {auto}.from_pretrained("{origin["checkpoint"]}"{revision}, config=config, '
            f"ignore_mismatched_sizes=True{', quantization_config=few' if before else ''})",
            *after,
            *loaded.helpers.get("growing", ()),
            *method.opening(loaded),
            f'processor = {processor}.from_pretrained("model")',
        ]
    return {
        "load": lines,
        "predict": [f"tunewright predict {run.path.name} INPUT"],
        "library": "transformers" if method.standalone else _library(run.path / "model"),
        "pipeline": task.pipeline,
        "base": origin,
        "labels": list(loaded.labels),
        "task": recipe.task.name,
        "method": recipe.method.name,
        "name": run.path.name,
    }
