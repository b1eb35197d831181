"""What goes wrong while a run is under way: full disks, signals, memory, NaN, damage, changed minds, two at once.

Each fault is made for real where it can be (a small tmpfs, kill, a cut file); each run is then ended by the same
command and compared with the run that nobody disturbed.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_answers, tiny_tree, write_text_rows
from safetensors.torch import load_file
from test_engine import DAMAGE, Counting, One, tiny_checkpoint

from tunewright import find
from tunewright.contracts import Callback, Loaded, Loss, Method, State, Task
from tunewright.data.batches import Steps
from tunewright.engine import checkpoint, keeping, memory
from tunewright.engine.callbacks import Log, Suspicion
from tunewright.engine.evaluate import predict_rows
from tunewright.engine.fit import fit
from tunewright.errors import RunError, TrainError
from tunewright.recipe import Recipe, TrainSpec
from tunewright.rundir import RunDir
from tunewright.runs import checking, training
from tunewright.runs.training import train

TASKS = find.names("tasks")
HERE = Path(__file__).parent
SHORT = {"max_steps": 9, "save_steps": 2, "logging_steps": 1, "precision": "float32", "learning_rate": 1e-3}


class At(Callback):
    """Does something after some steps."""

    def __init__(self, **what: Any) -> None:
        self.what = {int(name[1:]): call for name, call in what.items()}

    def on_step(self, state, logs):
        if state.step in self.what:
            self.what[state.step]()


class Killed(BaseException):
    """As a kill -9: nothing catches it."""


def killed() -> None:
    raise Killed


def run_of(recipe: Recipe, out: Path, *callbacks: Callback, **keys: Any) -> tuple[RunDir, list[str]]:
    said: list[str] = []
    return train(recipe, out, quiet=True, say=said.append, callbacks=callbacks, **keys), said


def said_while(error: type[BaseException], recipe: Recipe, out: Path, *callbacks: Callback) -> tuple[str, list[str]]:
    """What a run says that ends with this error."""
    said: list[str] = []
    with pytest.raises(error) as found:
        train(recipe, out, quiet=True, say=said.append, callbacks=callbacks)
    return str(found.value), said


def bytes_of(out: Path) -> dict[str, str]:
    """What must not differ: weights, the last checkpoint with its optimiser, and both logs without their clock."""
    last = max((out / "checkpoints").glob("[0-9]*"))
    files = [*(out / "model").glob("*.safetensors"), *last.glob("*.safetensors")]
    assert len(files) == 3
    found = {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    for name in ("metrics", "evaluations"):
        path = out / f"{name}.jsonl"
        lines = [json.loads(x) | {"seconds": 0} for x in path.read_text().splitlines()] if path.exists() else []
        found[name] = json.dumps(lines)
    return found


# ------------------------------------------------------------------------ full disk
@pytest.fixture
def disk(tmp_path):
    """A disk of three MiB, and a way to fill it."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")

    class Disk:
        path = place

        def fill(self) -> None:
            with (place / "ballast").open("wb", buffering=0) as file:
                file.write(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize))

        def empty(self) -> None:
            (place / "ballast").unlink()

    yield Disk()
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def short(tiny_recipe, tmp_path_factory):
    """A recipe, and the bytes of its undisturbed run."""
    recipe = tiny_recipe(train=SHORT | {"max_steps": 60})
    run, _ = run_of(recipe, tmp_path_factory.mktemp("short") / "run")
    return recipe, bytes_of(run.path)


@pytest.mark.promise(4)
@pytest.mark.parametrize("known", ["free space is asked for", "free space is not known"])
def test_a_full_disk_is_named_training_goes_on_and_the_end_is_the_same(short, disk, monkeypatch, measured, known):
    recipe, whole = short
    if known == "free space is not known":  # as under a quota: the write itself must say so
        free = shutil.disk_usage(disk.path)._replace(free=2**40)
        monkeypatch.setattr(keeping.shutil, "disk_usage", lambda path: free)
    run, said = run_of(recipe, disk.path / "run", At(_3=disk.fill, _51=disk.empty))
    told = [line for line in said if "disk is full" in line]
    assert "checkpoint 4 needs 0.1 MiB" in told[0]
    assert "the one of step 2 stands" in told[0]
    assert ("0.0 MiB are free" in told[0]) == (known == "free space is asked for")
    assert "metrics.jsonl waits for room" in told[1]
    assert len(told) == 2, "each is said once"
    assert [line for line in said if "There is room again: checkpoint 51" in line]
    assert bytes_of(run.path) == whole, "weights, optimiser and every line of the log"
    assert not list(run.path.glob("checkpoints/*.tmp-*"))
    measured(4)


AFTER = {
    "_save_model": "model/ needs up to 0.0 MiB, 0.0 MiB are free",
    "_evidence": "what was being written needs",
    "write_report": "what was being written needs",
    "write_card": "what was being written needs",
}


@pytest.mark.parametrize("moment", AFTER)
def test_a_full_disk_after_training_exits_1_and_the_same_command_finishes(
    short, disk, monkeypatch, tmp_path, cli, moment
):
    recipe, whole = short
    recipe.write(tmp_path / "recipe.yaml")
    words = ("train", tmp_path / "recipe.yaml", f"output_dir={disk.path / 'run'}")
    real = getattr(training, moment)

    def full(*args):
        disk.fill()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, moment, full)
        code, _, said = cli(*words)
    assert code == 1
    assert f"the disk is full: {AFTER[moment]}" in said
    assert "give the same command again" in said
    assert "Traceback" not in said
    assert not (disk.path / "run" / "README.md").exists()
    disk.empty()
    code, _, said = cli(*words)
    assert code == 0, said
    assert bytes_of(disk.path / "run") == whole
    assert (disk.path / "run" / "report.html").stat().st_size > 1000


@dataclasses.dataclass(frozen=True)
class Judged(Counting):
    metrics = (find.find("tasks", "text-classification", Task).metrics[0],)


def fit_one(
    folder: Path, spec: TrainSpec, *callbacks: Callback, rows=(1.0,), evaluate=None, task: Task | None = None, **keys
):
    """`fit` on the model of one weight. Its gradient is the mean of the rows."""
    examples = [{"row": f"r{i}", "x": torch.tensor([float(x)])} for i, x in enumerate(rows)]
    steps = Steps(
        examples, Counting().collate, lambda e, rng: e, seed=0, batch_size=spec.per_device_train_batch_size,
        accumulation=1, epochs=1, max_steps=spec.max_steps,
    )  # fmt: skip
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    full = find.build("methods", "full", {}, Method)
    return fit(
        task or Judged(), full, Loaded(One(), None, None), steps, spec, RunDir(folder), digest="d", callbacks=callbacks,
        evaluate=evaluate, **keys,
    )  # fmt: skip


@pytest.mark.promise(4)
@pytest.mark.parametrize("room_again", [7, 99])
def test_the_best_weights_found_while_the_disk_was_full_are_not_lost(tmp_path, monkeypatch, measured, room_again):
    """Validation says 1, 2, 1, 1, and there is no room from step 4 on, which is the best."""
    answers, step, weights = iter([1.0, 2.0, 1.0, 1.0]), [0], {}

    def evaluate(model):
        weights[step[0]] = model.w.item()
        return {"accuracy": next(answers)}

    class Watch(Callback):
        def on_step(self, state, logs):
            step[0] = state.step

    real = shutil.disk_usage
    monkeypatch.setattr(
        keeping.shutil, "disk_usage", lambda path: real(path)._replace(free=0 if 4 <= step[0] < room_again else 2**40)
    )
    spec = TrainSpec(
        learning_rate=0.1, max_steps=20, per_device_train_batch_size=1, optim="sgd", lr_scheduler_type="constant",
        eval_steps=2, early_stopping_patience=2, save_steps=2, save_total_limit=2, max_grad_norm=0,
    )  # fmt: skip
    state, model = fit_one(tmp_path, spec, Watch(), evaluate=evaluate)
    assert state.best_step == 4
    assert model.w.item() == weights[4] != weights[8]
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == (["000004", "000007", "000008"] if room_again == 7 else ["000002"])
    measured(4)


def test_a_log_that_cannot_even_be_begun_waits_for_room(tmp_path, monkeypatch):
    """The file's own first block may be what is wanting."""
    run, said, real = RunDir(tmp_path), [], Path.open

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = Log(run, 1, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        log.on_step(State(step=1, total=3), {"loss": 1.0})
    assert Path.open is real
    log.on_step(State(step=2, total=3), {"loss": 2.0})
    assert [line["loss"] for line in run.lines("metrics")] == [1.0, 2.0]
    assert len(said) == 1


def test_a_full_disk_does_not_keep_a_run_from_its_lock(disk):
    (disk.path / "run.lock").touch()
    disk.fill()
    run = RunDir(disk.path)
    with run.locked(), pytest.raises(RunError, match="in use by another process"), RunDir(disk.path).locked():
        pass
    disk.empty()
    with run.locked(), pytest.raises(RunError, match=f"in use by process {os.getpid()}"), RunDir(disk.path).locked():
        pass


def test_what_a_killed_save_left_makes_room_at_the_next_start(tmp_path):
    run, path = tiny_checkpoint(tmp_path, 2)
    shutil.copytree(path, path.with_name("000004.tmp-999"))
    path.rename(path.with_name("000002.tmp-replaced"))  # killed between the two renames of a save of the same step
    assert checkpoint.latest(run, "digest")[0].name == "000002"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000002"]


# ------------------------------------------------------------------------- signals
class Commands:
    """`tunewright` in children of a process that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        path = os.pathsep.join([str(HERE), *sys.path])
        self.worker = subprocess.Popen(
            [sys.executable, str(HERE / "fault_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert self.worker.stdout.readline() == "ready\n"

    def ask(self, **what: Any) -> int:
        self.worker.stdin.write(json.dumps(what) + "\n")
        self.worker.stdin.flush()
        return int(self.worker.stdout.readline())

    def start(self, *words: object, wait_at: str = ":0::") -> tuple[int, Path]:
        """Its process id, and the file that it speaks into. Returns once it has come to the place `wait_at`."""
        self.number += 1
        said, mark = self.folder / f"{self.number}.said", self.folder / f"{self.number}.mark"
        pid = self.ask(words=[str(w) for w in words], env={"WAIT_AT": f"{wait_at}:{mark}"}, out=str(said))
        end = time.monotonic() + 120
        while wait_at != ":0::" and not mark.exists():
            assert time.monotonic() < end, said.read_text()
            time.sleep(0.01)
        return pid, said

    def wait(self, pid: int) -> int:
        return self.ask(wait=pid)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    found = Commands(tmp_path_factory.mktemp("commands"))
    yield found
    found.worker.stdin.close()
    found.worker.wait(timeout=30)


@pytest.fixture(scope="module")
def slow(commands):
    """The words of a command that trains twelve steps and validates every third, and its undisturbed run's bytes."""
    folder = commands.folder
    tree = tiny_tree("text-classification", folder / "data") | {"task": "fault_tasks:Slow"}
    validation = write_text_rows(folder / "data" / "validation.csv", 16, seed=9)
    tree["data"] = {**tree["data"], "validation": str(validation)}
    tree["train"] = SHORT | {"max_steps": 12, "eval_steps": 3}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(tree))
    assert commands.ask(here=["train", str(file), f"output_dir={folder / 'whole'}"]) == 0
    assert len((folder / "whole" / "evaluations.jsonl").read_text().splitlines()) == 4
    return lambda out: ("train", file, f"output_dir={out}"), bytes_of(folder / "whole")


def newest(out: Path) -> int:
    return max((int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit()), default=0)


# where the signal comes -> the step whose checkpoint must stand when the process has left
MOMENTS = {
    "load:1:0.3": 0,  # before there is anything to save
    "loss:1:0.3": 1,
    "loss:5:0.3": 5,
    "_write:2:0.3": 5,  # in the save of step 4: the step after it is finished
    "predict:2:0.3": 6,  # in the evaluation after step 6
    "loss:12:0.3": 12,
    "_write:6:0.3": 12,  # in the last save: nothing may swallow the signal
    "_answers:1:0.3": 12,  # while the test rows are answered
    "write_report:1:0.3": 12,
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [(moment, signal.SIGTERM) for moment in MOMENTS]
    + [(moment, signal.SIGINT) for moment in ("loss:5:0.3", "predict:2:0.3", "_answers:1:0.3")],
)
def test_a_signal_saves_the_step_and_the_same_command_continues(commands, slow, tmp_path, moment, number):
    words, whole = slow
    out = tmp_path / "run"
    pid, said = commands.start(*words(out), wait_at=moment)
    began = time.monotonic()
    os.kill(pid, number)
    code = commands.wait(pid)
    seconds = time.monotonic() - began
    print(f"{number.name} at {moment}: left with {code} after {seconds:.2f} s")
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], said.read_text()
    assert newest(out) == MOMENTS[moment]
    assert "Traceback" not in said.read_text()
    assert seconds < 5
    pid, said = commands.start(*words(out))
    assert commands.wait(pid) == 0, said.read_text()
    assert bytes_of(out) == whole, "weights, optimiser, and every evaluation once"
    assert ("Continuing after step" in said.read_text()) == (MOMENTS[moment] > 0)


@pytest.mark.parametrize("how", ["20", "busy"])
def test_a_second_ctrl_c_leaves_at_once(commands, slow, tmp_path, how):
    """Also out of one long call into torch, between whose beginning and end Python runs no handlers."""
    words, whole = slow
    out = tmp_path / "run"
    pid, _ = commands.start(*words(out), wait_at=f"loss:5:{how}")
    time.sleep(0.3)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z", "the first one alone does not end it"
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    code = commands.wait(pid)
    seconds = time.monotonic() - began
    print(f"second SIGINT, {how}: left with {code} after {seconds:.2f} s")
    assert code == 130
    assert seconds < 1
    assert newest(out) == 4, "without a save, as asked"
    pid, said = commands.start(*words(out))
    assert commands.wait(pid) == 0, said.read_text()
    assert bytes_of(out) == whole


def test_the_command_itself_leaves_with_143(slow, tmp_path):
    """Without any of the test's machinery: `python -m tunewright`, SIGTERM, and the same again."""
    words, _ = slow
    mark, out = tmp_path / "mark", tmp_path / "run"
    path = os.pathsep.join([str(HERE), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WAIT_AT": f"loss:5:0.5:{mark}"}
    command = [sys.executable, "-m", "tunewright", *map(str, words(out))]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not mark.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Saved after step 5 of 12" in said
    assert newest(out) == 5


@pytest.mark.slow
def test_two_ranks_leave_together_and_continue(tmp_path):
    """SIGTERM to torchrun, which hands it on."""
    tree = tiny_tree("text-classification", tmp_path) | {"task": "fault_tasks:Slow"}
    tree["train"] = SHORT | {"max_steps": 12, "per_device_train_batch_size": 4}
    file, mark = tmp_path / "recipe.yaml", tmp_path / "mark"
    file.write_text(json.dumps(tree))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}

    def start(out: str, wait_at: str = ":0::") -> subprocess.Popen:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        return subprocess.Popen(
            [*launch, "-m", "tunewright", "train", str(file), f"output_dir={tmp_path / out}"],
            env=env | {"WAIT_AT": wait_at}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    process = start("killed", f"loss:5:0.5:{mark}")
    while not mark.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    print(f"torchrun left with {process.returncode}")
    assert process.returncode != 0
    assert "Saved after step 5 of 12" in said
    assert newest(tmp_path / "killed") == 5
    for out in ("killed", "whole"):
        process = start(out)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


# -------------------------------------------------------------------------- memory
class Fails(torch.autograd.Function):
    """The identity, until memory is wanting in its backward."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def little_memory(patch, name: str, rows: int, where: str = "loss", after: int = 0) -> type[Task]:
    """This task runs out of memory in loss or backward, or answering, of more than so many rows; not before the
    call number `after`."""
    kind, calls = find.find("tasks", name, Task), [0]
    loss, predict = kind.loss, kind.predict

    def num(batch) -> int:
        return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))

    def short_loss(self, model, batch, loaded):
        calls[0] += 1
        if calls[0] <= after or num(batch) <= rows:
            return loss(self, model, batch, loaded)
        if where == "loss":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        found = loss(self, model, batch, loaded)
        return Loss({term: Fails.apply(value) for term, value in found.totals.items()}, found.logs)

    def short_predict(self, model, batch, loaded):
        if len(batch["row"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(self, model, batch, loaded)

    if where == "predict":
        patch.setattr(kind, "predict", short_predict)
    else:
        patch.setattr(kind, "loss", short_loss)
    return kind


STEPPED = {
    "max_steps": 3, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "precision": "float32",
    "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0, "logging_steps": 1, "save_steps": 1,
}  # fmt: skip


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def logged(out: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def enough(tiny_recipe, tmp_path_factory):
    """Each task with enough memory: recipe and run folder. Two micro-batches of eight rows a step."""
    made = {}

    def make(task: str, **train: Any) -> tuple[Recipe, Path]:
        key = (task, *sorted(train))
        if key not in made:
            recipe = tiny_recipe(task, train=STEPPED | {"gradient_accumulation_steps": 2} | train)
            made[key] = recipe, run_of(recipe, tmp_path_factory.mktemp("enough") / task)[0].path
        return made[key]

    return make


def test_a_cut_batch_has_every_row_once_and_its_lists_with_it():
    for rows in range(1, 18):
        batch = {"row": [f"r{i}" for i in range(rows)], "x": torch.arange(rows), "documents": ["a"] * (rows + 3)}
        for pieces in (1, 2, 4, 8, 16, 32):
            cut = memory.cut(batch, pieces)
            assert [len(piece["x"]) for piece in cut] == [len(piece["row"]) for piece in cut]
            assert torch.cat([piece["x"] for piece in cut]).tolist() == list(range(rows))
            assert [row for piece in cut for row in piece["row"]] == batch["row"]
            assert all(piece["documents"] == batch["documents"] for piece in cut)
            assert max(len(piece["x"]) for piece in cut) <= -(-rows // min(pieces, rows))


@pytest.mark.promise(6)
@pytest.mark.parametrize("where", ["loss", "backward", "second backward"])
@pytest.mark.parametrize("task", TASKS)
def test_out_of_memory_gives_the_same_update(enough, tmp_path, monkeypatch, measured, task, where):
    """second backward: gradients of the first micro-batch are there already, and must not count twice."""
    recipe, whole = enough(task, packing=False) if task in ("sft", "causal-lm") else enough(task)
    little_memory(monkeypatch, task, 4, where.split()[-1], after=1 if where.startswith("second") else 0)
    run, said = run_of(recipe, tmp_path / "run")
    told = [line for line in said if "Out of memory" in line]
    assert len(told) == 1
    assert "in step 1: micro-batches of 8 rows are cut into 2 pieces" in told[0]
    one, two = trained(whole), trained(run.path)
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst <= 1e-6
    assert logged(run.path, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    assert logged(run.path, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-5)
    measured(6, value=worst)


@pytest.mark.promise(6)
@pytest.mark.parametrize("task", [t for t in TASKS if find.find("tasks", t, Task).packs])
def test_out_of_memory_with_packed_rows_gives_the_same_update(enough, tmp_path, monkeypatch, measured, task):
    recipe, whole = enough(task, packing=True)
    little_memory(monkeypatch, task, 1)
    run, said = run_of(recipe, tmp_path / "run")
    assert [line for line in said if "Out of memory" in line]
    one, two = trained(whole), trained(run.path)
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst <= 1e-6
    assert logged(run.path, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    measured(6, value=worst)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_was_cut_for_memory_is_cut_when_it_continues(enough, tmp_path, monkeypatch, task):
    recipe, _ = enough(task, packing=False) if task in ("sft", "causal-lm") else enough(task)
    little_memory(monkeypatch, task, 2)
    whole, _ = run_of(recipe, tmp_path / "whole")
    said_while(Killed, recipe, tmp_path / "run", At(_3=killed))
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "000002")[0].pieces == 4
    run, said = run_of(recipe, tmp_path / "run")
    assert not [line for line in said if "Out of memory" in line], "it knows"
    assert bytes_of(run.path) == bytes_of(whole.path)


def test_a_single_row_that_does_not_fit_is_an_error_with_a_remedy(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(train=STEPPED)
    little_memory(monkeypatch, "text-classification", 0)
    text, said = said_while(TrainError, recipe, tmp_path / "run")
    assert "step 1: memory does not reach for a single row; got CUDA out of memory" in text
    assert "gradient_checkpointing" in text
    assert len([line for line in said if "Out of memory" in line]) == 3, "8, 4, 2"


def test_rows_that_belong_together_are_not_parted(tmp_path):
    """Cutting a contrastive batch would change what is learnt."""

    @dataclasses.dataclass(frozen=True)
    class Coupled(Judged):
        couples_rows = True

        def loss(self, model, batch, loaded):
            raise torch.OutOfMemoryError("out of memory")

    spec = TrainSpec(learning_rate=0.1, max_steps=1, per_device_train_batch_size=4)
    with pytest.raises(TrainError, match=r"4 rows, which this task cannot part.*per_device_train_batch_size"):
        fit_one(tmp_path, spec, rows=[1.0] * 4, task=Coupled())


@pytest.mark.parametrize("task", TASKS)
def test_out_of_memory_while_answering_gives_the_same_answers(tiny_recipe, monkeypatch, task):
    ready = checking.prepare(tiny_recipe(task))
    chosen, loaded = checking.load(ready)
    examples = [chosen.encode(r, loaded) for r in ready.data.test]
    said: list[str] = []
    before = predict_rows(chosen, loaded.model, loaded, examples)
    little_memory(monkeypatch, task, 3, "predict")
    after = predict_rows(chosen, loaded.model, loaded, examples, say=said.append)
    same_answers(before, after, abs=1e-6)
    assert [line.split(":")[1].split(" rows")[0] for line in said] == [" 9", " 4", " 2"]
    little_memory(monkeypatch, task, 0, "predict")
    with pytest.raises(TrainError, match=r"single row.*got CUDA out of memory"):
        predict_rows(chosen, loaded.model, loaded, examples, say=said.append)


def test_memory_that_is_wanting_elsewhere_is_no_fault_of_ours(tiny_recipe, tmp_path, monkeypatch, cli):
    def wanting(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", wanting)
    tiny_recipe(train=SHORT).write(tmp_path / "recipe.yaml")
    code, _, said = cli("train", tmp_path / "recipe.yaml", f"output_dir={tmp_path / 'run'}")
    assert code == 1
    assert "memory does not reach; got CUDA out of memory" in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------ NaN
LAYER = "bert.encoder.layer.1.intermediate.dense"


def poison(kind: str):
    """What turns into NaN in the sixth step; the fourth is saved."""

    class Poison(Callback):
        def on_start(self, state, model):
            self.model, self.layer = model, model.get_submodule(LAYER)

        def on_step(self, state, logs):
            if state.step != 5:
                return
            if kind == "weight":
                with torch.no_grad():
                    self.layer.weight[0, 0] = float("nan")
            if kind == "gradient":
                self.layer.weight.register_hook(lambda gradient: gradient * float("nan"))
            if kind == "activation":
                self.layer.register_forward_hook(lambda module, given, output: output / 0)

    return Poison()


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("loss", "loss and grad_norm not finite.*; first in the loss"),
        ("gradient", f"grad_norm not finite.*; first in the gradient of {LAYER}.weight"),
        ("weight", f"loss and grad_norm not finite.*; first in module {LAYER}"),
        ("activation", f"loss and grad_norm not finite.*; first in module {LAYER}"),
    ],
)
def test_nan_stops_before_the_step_and_names_step_rows_and_module(
    tiny_recipe, tmp_path, monkeypatch, measured, kind, expected
):
    recipe = tiny_recipe(train=SHORT)
    whole, _ = run_of(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        if kind == "loss":
            task, calls = find.find("tasks", "text-classification", Task), [0]
            loss = task.loss

            def bad(self, model, batch, loaded):
                calls[0] += 1
                found = loss(self, model, batch, loaded)
                factor = float("nan") if calls[0] >= 6 else 1.0
                return Loss({term: value * factor for term, value in found.totals.items()})

            patch.setattr(task, "loss", bad)
        text, _ = said_while(TrainError, recipe, tmp_path / "run", poison(kind))
    assert re.search(f"step 6 of 9: {expected}", text), text
    assert "rows rows.csv:" in text
    assert "the step was not taken" in text
    assert (tmp_path / "run" / "error.txt").read_text().strip() == text
    assert checkpoint.latest(RunDir(tmp_path / "run"), recipe.digest())[0].name == "000004"
    run, said = run_of(recipe, tmp_path / "run")
    assert "Continuing after step 4 of 9 (checkpoint 000004)." in said
    assert bytes_of(run.path) == bytes_of(whole.path), "the step that was not taken was taken now"
    measured(10)


def test_a_run_that_met_nan_exits_1(tiny_recipe, tmp_path, monkeypatch, cli):
    task = find.find("tasks", "text-classification", Task)
    monkeypatch.setattr(
        task, "loss", lambda self, model, batch, loaded: Loss({"cross_entropy": model.classifier.weight.sum() / 0})
    )
    tiny_recipe(train=SHORT).write(tmp_path / "recipe.yaml")
    code, _, said = cli("train", tmp_path / "recipe.yaml", f"output_dir={tmp_path / 'run'}")
    assert code == 1
    assert "step 1 of 9: loss and grad_norm not finite" in said
    assert "Traceback" not in said


@pytest.mark.promise(4)
@pytest.mark.parametrize("step", [4, 5, 20])
def test_weights_that_are_not_finite_are_never_written_nor_the_best(tmp_path, monkeypatch, measured, step):
    """They come with the update itself, its gradient finite: at a save, between saves, and in the last step."""
    full, real = find.find("methods", "full", Method), find.find("methods", "full", Method).after_step
    taken = [0]

    def overflow(self, model, groups):
        real(self, model, groups)
        taken[0] += 1
        if taken[0] == step:
            with torch.no_grad():
                model.w.fill_(float("inf"))

    monkeypatch.setattr(full, "after_step", overflow)
    spec = TrainSpec(
        learning_rate=0.1, max_steps=20, per_device_train_batch_size=1, optim="sgd", eval_steps=2, save_steps=2,
        early_stopping_patience=9, save_total_limit=2,
    )  # fmt: skip
    with pytest.raises(TrainError, match="finite"):
        fit_one(tmp_path, spec, evaluate=lambda model: {"accuracy": abs(model.w.item()) if step != 4 else 0.5})
    found, skipped = checkpoint.latest(RunDir(tmp_path), "d")
    state, tensors, _ = checkpoint.load(found)
    assert skipped == []
    assert state.step == (step - 1) // 2 * 2
    assert state.best_step <= state.step
    assert checkpoint.at_step(RunDir(tmp_path), state.best_step).is_dir()
    assert tensors["model"]["w"].isfinite().all()
    measured(4)


@pytest.mark.promise(4)
@pytest.mark.parametrize("days", [-30, 30])
def test_a_clock_that_is_wrong_loses_no_checkpoint(tmp_path, measured, days):
    """The best is that of step 4, of ten steps; every folder's time is set a month off as soon as it stands."""
    answers = iter([1.0, 2.0, 1.0, 1.0, 1.0])

    class Skew(Callback):
        def on_step(self, state, logs):
            for path in (tmp_path / "checkpoints").glob("*"):
                os.utime(path, (time.time() + (state.step % 3 - 1) * days * 86400,) * 2)

    spec = TrainSpec(
        learning_rate=0.1, max_steps=10, per_device_train_batch_size=1, optim="sgd", eval_steps=2, save_steps=1,
        early_stopping_patience=9, save_total_limit=2,
    )  # fmt: skip
    fit_one(tmp_path, spec, Skew(), evaluate=lambda model: {"accuracy": next(answers)})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000004", "000009", "000010"]
    assert checkpoint.latest(RunDir(tmp_path), "d")[0].name == "000010"
    measured(4)


# ------------------------------------------------------------------- strange losses
def warnings_of(losses: list[float]) -> list[str]:
    said: list[str] = []
    watch = Suspicion(said.append)
    for i, loss in enumerate(losses):
        watch.on_step(State(step=i + 1, total=len(losses)), {"loss": loss})
    return said


def test_a_dead_loss_warns_once():
    said = warnings_of([1.0] * 5 + [0.0] * 100)
    assert len(said) == 1
    assert said[0].startswith("Warning at step 15: the loss has been 0 or less for 10 steps")


def test_an_exploding_loss_warns_once():
    said = warnings_of([2.0] * 20 + [2.0 * 1.2**i for i in range(60)])
    assert len(said) == 1
    assert "the loss has risen from 2 to" in said[0]


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_loss_does_not_warn(seed):
    """Falling from 3 to 0.05 with noise of half its size, and single batches ten times as hard; also below zero."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.rand(500, generator=rng) + 0.5
    losses = [0.05 + 3 * 0.99**i for i in range(500)] * noise.numpy()
    losses[::97] *= 10
    assert warnings_of(losses.tolist()) == []
    assert warnings_of((losses - 3).tolist()) == []


# ----------------------------------------------------------------- two in one folder
def test_the_second_process_in_a_folder_is_refused_and_told_who_is_there(commands, slow, tmp_path):
    words, whole = slow
    out = tmp_path / "run"
    first, _ = commands.start(*words(out), wait_at="loss:3:3")
    second, said = commands.start(*words(out))
    assert commands.wait(second) == 2
    told = said.read_text()
    assert f"in use by process {first} on {os.uname().nodename}, started 20" in told
    os.kill(first, signal.SIGKILL)
    assert commands.wait(first) == -9
    third, said = commands.start(*words(out))
    assert commands.wait(third) == 0, "the lock of a dead process is free"
    assert bytes_of(out) == whole


# ----------------------------------------------------------- what differs on resuming
@pytest.fixture
def stopped(tiny_recipe, tmp_path):
    """A run that was killed in its sixth of nine steps, its recipe, and rows of its own."""
    rows = write_text_rows(tmp_path / "rows.csv", 60)
    recipe = tiny_recipe(train=SHORT, data={"train": str(rows), "holdout": 0.3})
    said_while(Killed, recipe, tmp_path / "run", At(_6=killed))
    return recipe, tmp_path / "run", rows


def with_train(recipe: Recipe, **keys: Any) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **keys))


def test_a_changed_learning_rate_needs_leave_and_is_then_used(stopped, tmp_path):
    recipe, out, _ = stopped
    changed = with_train(recipe, learning_rate=5e-4)
    with pytest.raises(RunError, match=r"train.learning_rate: 0.001 there, 0.0005 now.*--allow-change"):
        run_of(changed, out)
    run, said = run_of(changed, out, allow_change=True)
    assert "Continuing after step 4 of 9 (checkpoint 000004)." in said
    undisturbed = logged(run_of(recipe, tmp_path / "undisturbed")[0].path, "learning_rate")
    rates = [rate * (1 if i < 4 else 0.5) for i, rate in enumerate(undisturbed)]
    assert logged(run.path, "learning_rate") == pytest.approx(rates)
    noted = run.lines("changes")
    assert [line["changes"] for line in noted] == ["train.learning_rate: 0.001 there, 0.0005 now"]
    assert "learning_rate: 0.0005" in (out / "recipe.yaml").read_text()


def test_changed_rows_need_leave(stopped):
    recipe, out, rows = stopped
    rows.write_text(rows.read_text().replace("sun", "day", 1))
    with pytest.raises(RunError, match=r"began with other data: .*rows.csv differs.*--allow-change"):
        run_of(recipe, out)
    _, said = run_of(recipe, out, allow_change=True)
    assert [line for line in said if "Other data than at the start of this run, as allowed" in line]
    assert "Continuing after step 4 of 9 (checkpoint 000004)." in said


@pytest.mark.parametrize("section", ["model", "task", "method", "seed"])
def test_another_model_task_method_or_seed_is_another_run(stopped, section, tiny_recipe):
    recipe, out, _ = stopped
    others = {
        "model": dataclasses.replace(recipe.model, revision="other"),
        "task": dataclasses.replace(recipe.task, options={"max_length": 9}),
        "method": dataclasses.replace(recipe.method, name="lora"),
        "seed": 1,
    }
    with pytest.raises(RunError, match=rf"{section}[^:]*: .* there, .* now") as found:
        RunDir.create(out, dataclasses.replace(recipe, **{section: others[section]}), allow_change=True)
    assert "allow-change" not in str(found.value)


def test_what_was_measured_is_not_given_to_another_model(short, tmp_path, tiny_recipe):
    """Once the test rows are opened a change would train on and keep the old evidence."""
    recipe = tiny_recipe(train=SHORT)
    run, _ = run_of(recipe, tmp_path / "run")
    before = (run.path / "recipe.yaml").read_text()
    for finished in (True, False):
        if not finished:
            (run.path / "README.md").unlink()
        with pytest.raises(RunError, match="another recipe") as found:
            run_of(with_train(recipe, max_steps=20), run.path, allow_change=True)
        assert "--allow-change" not in str(found.value)
    assert (run.path / "recipe.yaml").read_text() == before


def test_the_recipe_of_a_run_under_way_is_not_changed_by_another_process(stopped):
    recipe, out, _ = stopped
    before = (out / "recipe.yaml").read_text()
    with RunDir(out).locked(), pytest.raises(RunError, match="in use by process"):
        run_of(with_train(recipe, max_steps=20), out, allow_change=True)
    assert (out / "recipe.yaml").read_text() == before


@pytest.mark.parametrize("name", ["torch", "transformers", "peft"])
def test_another_version_of_a_library_is_said(stopped, name):
    recipe, out, _ = stopped
    stored = json.loads((out / "environment.json").read_text())
    now, stored[name] = stored[name], "0.0.1"
    (out / "environment.json").write_text(json.dumps(stored))
    _, said = run_of(recipe, out)
    assert [line for line in said if f"This run began with {name} 0.0.1, now {now}" in line]


def test_a_start_that_was_cut_short_is_begun_again(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train=SHORT)
    for leftover in ("checkpoints", "recipe.yaml.tmp", "recipe.yaml.tmp.partial", "recipe.yaml.partial"):
        out = tmp_path / leftover
        (out / "checkpoints").mkdir(parents=True)
        if leftover != "checkpoints":
            (out / leftover).write_text("half")
        assert RunDir.create(out, recipe).recipe() == recipe
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recipe.yaml").write_text("model: mine")
    with pytest.raises(RunError, match="no run"):
        RunDir.create(tmp_path / "own", recipe)


# ------------------------------------------------------------- damage to a real run
REAL = {"lora": ("text-classification", "lora"), "image full": ("image-classification", "full")}


@pytest.fixture(scope="module")
def killed_runs(tiny_recipe, tmp_path_factory):
    """A run killed in its sixth step with checkpoints 2 and 4, and the bytes of the whole one."""
    found = {}
    for name, (task, method) in REAL.items():
        folder = tmp_path_factory.mktemp("real")
        recipe = tiny_recipe(task, method=method, train=SHORT)
        whole, _ = run_of(recipe, folder / "whole")
        said_while(Killed, recipe, folder / "run", At(_6=killed))
        assert sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()) == ["000002", "000004"]
        found[name] = recipe, folder / "run", bytes_of(whole.path)
    return found


@pytest.mark.promise(3)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("name", REAL)
def test_a_damaged_run_falls_back_says_so_and_ends_the_same(killed_runs, tmp_path, measured, name, file, damage):
    recipe, begun, whole = killed_runs[name]
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    DAMAGE[damage](out / "checkpoints" / "000004" / file)
    run, said = run_of(recipe, out)
    told = [line for line in said if line.startswith("checkpoint 000004 skipped: ")]
    assert len(told) == 1
    assert file in told[0]
    assert "Continuing after step 2 of 9 (checkpoint 000002)." in said
    assert (out / "quarantine" / "000004").is_dir()
    assert bytes_of(run.path) == whole
    measured(3)


@pytest.mark.promise(3)
def test_every_flipped_bit_of_a_manifest_is_found(tmp_path, measured):
    """It holds the hashes of the others, and nothing holds its own."""
    _, path = tiny_checkpoint(tmp_path, 2)
    manifest = path / "MANIFEST.json"
    content, found = manifest.read_bytes(), 0
    for i in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        manifest.write_bytes(flipped)
        found += checkpoint.verify(path, {"digest"}) is not None
    assert found == 8 * len(content)
    manifest.write_bytes(content)
    assert checkpoint.verify(path, {"digest"}) is None
    measured(3, got=found, of=found)
