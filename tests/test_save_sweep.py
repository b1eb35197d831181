"""Every file operation of a run is made to fail once, after SQLite's example: the run recovers from each.

Before or after a save, never between: what is found afterwards is a state that the undisturbed run had, no older than
the last save that came back, and the next start ends with its bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faulty_disk import Disk, Killed
from safetensors import SafetensorError
from test_engine import Counting, One

from tunewright import find
from tunewright.contracts import Callback, Loaded, Method, State, Task
from tunewright.data.batches import Steps
from tunewright.engine import checkpoint
from tunewright.engine.callbacks import Log
from tunewright.engine.fit import fit
from tunewright.engine.keeping import is_full
from tunewright.errors import RunError
from tunewright.recipe import Recipe, TrainSpec
from tunewright.rundir import RunDir

ROWS = [3.0, -1.0, 2.0, 5.0]
SPEC = TrainSpec(
    learning_rate=0.1, max_steps=6, per_device_train_batch_size=1, optim="adamw", save_steps=2, save_total_limit=2,
    eval_steps=3, early_stopping_patience=9, logging_steps=1,
)  # fmt: skip
LIVES = {  # which folders' names reach the disk without being asked to
    "nothing": lambda name: False,
    "all names": lambda name: True,
    "names in checkpoints/": lambda name: name == "checkpoints",
    "names elsewhere": lambda name: name != "checkpoints",
}


@dataclasses.dataclass(frozen=True)
class Judged(Counting):
    metrics = (find.find("tasks", "text-classification", Task).metrics[0],)


RECIPE = Recipe.of({"model": "m", "task": "t", "data": {"train": "d"}, "method": "full"})[0]
SLOWER = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, learning_rate=0.05))


class Weights(Callback):
    """The weight after each step."""

    def __init__(self, kept: dict[int, float] | None = None) -> None:
        self.kept = kept if kept is not None else {}

    def on_step(self, state, logs):
        self.kept[state.step] = self.model.w.item()

    def on_start(self, state, model):
        self.model = model


def train(folder: Path, kept: dict[int, float] | None = None) -> None:
    """A whole run as runs/training.py writes it: folder, lock, log, checkpoints, model/, and the card last."""
    run = RunDir.create(folder, RECIPE)
    examples = [{"row": f"r{i}", "x": torch.tensor([x])} for i, x in enumerate(ROWS)]
    steps = Steps(
        examples, Judged().collate, lambda e, rng: e, seed=0, batch_size=1, accumulation=1, epochs=1, max_steps=6
    )
    full = find.build("methods", "full", {}, Method)
    with run.locked():
        _, model = fit(
            Judged(), full, Loaded(One(), None, None), steps, SPEC, run, digest=RECIPE.digest(),
            callbacks=[Log(run, 1), Weights(kept)], evaluate=lambda m: {"accuracy": -abs(m.w.item() + 0.3)},
        )  # fmt: skip
        with run.whole_folder("model") as place:
            (place / "weights.json").write_text(json.dumps(model.w.tolist()))
        run.write_json("evidence.json", {})
        run.sync()
        run.write_text("README.md", "done")


def state_of(folder: Path) -> dict[str, str]:
    """What must be as in the undisturbed run: all but older checkpoints, which may be of other steps, and clocks."""
    found, last = {}, max((folder / "checkpoints").glob("[0-9]*"))
    for path in [p for p in folder.glob("*") if p.is_file()] + [*last.iterdir()] + [*(folder / "model").iterdir()]:
        content = path.read_bytes()
        if path.name in ("metrics.jsonl", "state.json"):
            lines = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([line | {"seconds": 0} for line in lines]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    assert checkpoint.verify(last, {RECIPE.digest()}) is None
    return {name: digest for name, digest in found.items() if name != "run.lock" and "MANIFEST" not in name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run: its folder, its files, the disk that counted, and the weight after each step."""
    folder, kept = tmp_path_factory.mktemp("whole") / "run", {}
    with pytest.MonkeyPatch.context() as patch, Disk(folder.parent).mounted(patch) as disk:
        train(folder, kept)
    return folder, state_of(folder), disk, kept


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A run that was killed in its sixth step, its newest checkpoint damaged since."""
    folder = tmp_path_factory.mktemp("damaged") / "run"

    def kill(state, logs):
        if state.step == 6:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "on_step", lambda self, state, logs: kill(state, logs))
        with pytest.raises(Killed):
            train(folder)
    (folder / "checkpoints" / "000004" / "model.safetensors").write_bytes(b"")
    return folder


def test_the_sweep_sees_every_kind_of_operation(whole):
    folder, files, disk, kept = whole
    assert set(disk.kinds) == {"open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir"}
    assert disk.count >= 140
    assert len(files) == 9
    assert len(set(kept.values())) == 6
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000004", "000006"]


def disturb(folder: Path, how: str, at: int, monkeypatch, lives=None) -> tuple[int, bool]:
    """One start with one fault. Returns the step of the last save that came back, and whether the fault came."""
    saved, save, disk = [0], checkpoint.save, Disk(folder.parent, how, at)

    def noted(run, state, *rest):
        path = save(run, state, *rest)
        saved.append(state.step)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", noted)
        with disk.mounted(monkeypatch):
            fault: BaseException | None = None
            try:
                train(folder)
            except (Killed, OSError, SafetensorError, RunError) as error:
                fault = error
    if lives:
        disk.power_cut(lives)
    disk.release()
    if how in ("kill", "power"):
        assert isinstance(fault, Killed) or disk.count < at
    elif fault:
        assert is_full(fault.__cause__ or fault) == (how != "eio")
    return saved[-1], disk.count >= at


def check(folder: Path, whole, saved: int) -> None:
    """A state that the undisturbed run had, not older than the last save that came back; then the same end."""
    _, files, _, kept = whole
    if (folder / "checkpoints").is_dir():
        found, _ = checkpoint.latest(RunDir(folder), RECIPE.digest())
        if found:
            state, tensors, _ = checkpoint.load(found)
            assert tensors["model"]["w"].item() == kept[state.step]
        assert (state.step if found else 0) >= saved
    if RunDir(folder).finished:  # perhaps without its last checkpoint, if there was no room for it
        files = {name: digest for name, digest in files.items() if not name.startswith("checkpoints")}
    else:
        train(folder)
    assert files.items() <= state_of(folder).items()
    assert not [p for p in folder.rglob("*") if ".tmp-" in p.name]


def sweep(whole, where: Path, how: str, monkeypatch, lives=None, begun: Path | None = None) -> int:
    """Each operation of a start fails in its turn; how many there were."""
    at, came = 0, True
    while came:
        at += 1
        folder = where / str(at) / "run"
        folder.parent.mkdir()
        if begun:
            shutil.copytree(begun, folder)
        saved, came = disturb(folder, how, at, monkeypatch, lives)
        check(folder, whole, saved)
        shutil.rmtree(folder.parent)
    return at - 1


@pytest.mark.promise(4)
@pytest.mark.parametrize("how", ["kill", "eio", "enospc", "full"])
def test_every_operation_of_a_run_may_fail(whole, tmp_path, monkeypatch, measured, how):
    swept = sweep(whole, tmp_path, how, monkeypatch)
    assert swept == whole[2].count
    measured(4, got=swept, of=swept)
    print(f"{how}: {swept} operations")


@pytest.mark.promise(4)
@pytest.mark.parametrize("lives", LIVES)
def test_a_power_cut_at_every_operation_loses_nothing_that_was_saved(whole, tmp_path, monkeypatch, measured, lives):
    swept = sweep(whole, tmp_path, "power", monkeypatch, LIVES[lives])
    assert swept == whole[2].count
    measured(4, got=swept, of=swept)
    print(f"power cut, {lives} living: {swept} operations")


@pytest.mark.promise(4)
@pytest.mark.parametrize("how", ["kill", "eio", "power"])
def test_every_operation_of_a_start_that_finds_damage_may_fail(whole, damaged, tmp_path, monkeypatch, measured, how):
    lives = LIVES["names elsewhere"] if how == "power" else None
    swept = sweep(whole, tmp_path, how, monkeypatch, lives, begun=damaged)
    assert swept >= 40
    measured(4, got=swept, of=swept)
    print(f"{how} after damage: {swept} operations")


@pytest.mark.promise(4)
@pytest.mark.parametrize("lives", LIVES)
@pytest.mark.parametrize("how", ["kill", "eio", "enospc", "power"])
def test_a_checkpoint_that_is_written_again_is_the_old_or_the_new_one(tmp_path, monkeypatch, measured, how, lives):
    """As after a signal in an evaluation: the same step, now with its score."""
    run = RunDir(tmp_path / "disk")
    at, came = 0, True
    while came:
        at += 1
        (run.path / "checkpoints").mkdir(parents=True)
        for step, value in ((1, 1.0), (2, 2.0)):
            checkpoint.save(run, State(step=step), "d", {"model": {"w": torch.tensor([value])}}, {})
        disk = Disk(run.path, how, at)
        with disk.mounted(monkeypatch), contextlib.suppress(Killed, OSError, SafetensorError):
            checkpoint.save(run, State(step=2, best=0.5), "d", {"model": {"w": torch.tensor([3.0])}}, {})
        if how == "power":
            disk.power_cut(LIVES[lives])
        disk.release()
        came = disk.count >= at
        found, skipped = checkpoint.latest(run, "d")
        state, tensors, _ = checkpoint.load(found)
        assert (state.step, state.best, tensors["model"]["w"].item()) in ((2, None, 2.0), (2, 0.5, 3.0)), skipped
        shutil.rmtree(run.path)
    assert at > 15
    measured(4, got=at - 1, of=at - 1)


@pytest.mark.parametrize("how", ["kill", "eio", "power"])
def test_a_changed_recipe_never_makes_checkpoints_strange(damaged, tmp_path, monkeypatch, how):
    at, done = 0, False
    while not done:
        at += 1
        folder = tmp_path / str(at) / "run"
        shutil.copytree(damaged, folder)
        disk = Disk(folder.parent, how, at)
        try:
            with disk.mounted(monkeypatch):
                RunDir.create(folder, SLOWER, allow_change=True)
            done = True
        except (Killed, RunError):
            assert disk.count >= at
        if how == "power" and not done:
            disk.power_cut(LIVES["all names"])
        disk.release()
        run = RunDir.create(folder, SLOWER, allow_change=True)
        assert checkpoint.latest(run, SLOWER.digest())[0].name == "000003"
        assert run.recipe().digest() == SLOWER.digest()
    assert at >= 10
    print(f"{how} in a change of recipe: {at - 1} operations")


@pytest.mark.slow
@pytest.mark.promise(4)
def test_a_real_kill_at_every_system_call(tmp_path, measured):
    """The same with SIGKILL out of libc itself, safetensors' own writes among the calls."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("no C compiler here, or no Linux")
    here, library = Path(__file__).parent, tmp_path / "kill_at_syscall.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, here / "kill_at_syscall.c", "-ldl"], check=True)
    path = os.pathsep.join([str(here), *sys.path])
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(here / "syscall_worker.py"), str(tmp_path)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    swept = int(done.stdout)
    assert swept >= 140
    measured(4, got=swept, of=swept)
    print(f"SIGKILL at each of {swept} system calls")
