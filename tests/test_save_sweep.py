"""Every file operation of a run is made to fail once, after SQLite's example: the run recovers from each.

Before or after a save, never between: what is found afterwards is a state that the undisturbed run had, no older than
the last save that came back, and the next start ends with its bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from faulty_disk import Disk, Killed
from safetensors import SafetensorError
from test_engine import Counting, One

from tunewright import find
from tunewright.contracts import Loaded, Method, Task
from tunewright.data.batches import Steps
from tunewright.engine import checkpoint
from tunewright.engine.callbacks import Log
from tunewright.engine.fit import fit
from tunewright.engine.keeping import is_full
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


def train(folder: Path, said: list[str] | None = None) -> None:
    """A whole run as runs/training.py writes it: folder, lock, log, checkpoints, model/, and the card last."""
    recipe = Recipe.of({"model": "m", "task": "t", "data": {"train": "d"}, "method": "full"})[0]
    run = RunDir.create(folder, recipe)
    examples = [{"row": f"r{i}", "x": torch.tensor([x])} for i, x in enumerate(ROWS)]
    steps = Steps(
        examples, Judged().collate, lambda e, rng: e, seed=0, batch_size=1, accumulation=1, epochs=1, max_steps=6
    )
    full = find.build("methods", "full", {}, Method)
    say = (said if said is not None else []).append
    with run.locked():
        _, model = fit(
            Judged(), full, Loaded(One(), None, None), steps, SPEC, run, digest=recipe.digest(), say=say,
            callbacks=[Log(run, 1, say)], evaluate=lambda m: {"accuracy": -abs(m.w.item() + 0.3)},
        )  # fmt: skip
        with run.whole_folder("model") as place:
            (place / "weights.json").write_text(json.dumps(model.w.tolist()))
        run.write_json("evidence.json", {})
        run.sync()
        run.write_text("README.md", "done")


def state_of(folder: Path) -> dict[str, str]:
    """What must be as in the undisturbed run: every file, the clock in the logs left out."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        if name == "run.lock" or name.startswith("quarantine"):
            continue
        if path.name in ("metrics.jsonl", "state.json"):
            lines = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([line | {"seconds": 0} for line in lines]).encode()
        if path.name == "MANIFEST.json":  # its hashes are checked when it is verified; that of state.json has the clock
            content = str(checkpoint.verify(path.parent, {json.loads(content)["recipe"]})).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run: its files, how many operations it took, and each state that was saved."""
    folder, states = tmp_path_factory.mktemp("whole") / "run", {}
    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:

        def noted(run, state, digest, tensors, extra):
            states[state.step] = {k: t.clone() for k, t in tensors["model"].items()}
            return save(run, state, digest, tensors, extra)

        patch.setattr(checkpoint, "save", noted)
        with Disk(folder.parent).mounted(patch) as disk:
            train(folder)
    assert sorted(states) == [2, 3, 4, 6]
    return state_of(folder), disk, states, folder


def test_the_sweep_sees_every_kind_of_operation(whole):
    _, disk, _, folder = whole
    assert set(disk.kinds) == {"open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir"}
    assert disk.count >= 150
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000004", "000006"]


def disturb(folder: Path, how: str, at: int, monkeypatch, lives=None) -> tuple[int, list[str]]:
    """One run with one fault. Returns (the step of the last save that came back, what was said)."""
    saved, said, save = [0], [], checkpoint.save
    disk = Disk(folder.parent, how, at)
    with monkeypatch.context() as patch:

        def noted(run, state, *rest):
            path = save(run, state, *rest)
            saved.append(state.step)
            return path

        patch.setattr(checkpoint, "save", noted)
        with disk.mounted(monkeypatch):
            try:
                train(folder, said)
            except Killed:
                assert how in ("kill", "power")
            except Exception as error:
                assert how not in ("kill", "power"), error
                cause = error.__cause__ or error
                assert isinstance(cause, (OSError, SafetensorError)), error
                assert is_full(cause) == (how != "eio"), error
    if lives:
        disk.power_cut(lives)
    disk.release()
    return saved[-1], said


def check(folder: Path, whole, saved: int) -> None:
    """A state that the undisturbed run had, not older than the last save that came back; then the same end."""
    files, _, states, _ = whole
    run = RunDir(folder)
    if (folder / "checkpoints").is_dir():
        digest = Recipe.of({"model": "m", "task": "t", "data": {"train": "d"}, "method": "full"})[0].digest()
        found, _ = checkpoint.latest(run, digest)
        state, tensors, _ = checkpoint.load(found) if found else (None, {}, {})
        assert (state.step if state else 0) >= saved
        if state:
            assert all(torch.equal(t, states[state.step][k]) for k, t in tensors["model"].items())
    if not run.finished:
        train(folder)
    assert state_of(folder) == files


def points(whole, slow: bool) -> range:
    """Every operation, or in the quick run those of the third save and what follows it."""
    _, disk, _, _ = whole
    return range(1, disk.count + 1)


@pytest.mark.parametrize("how", ["kill", "eio", "enospc", "full"])
def test_every_operation_of_a_run_may_fail(whole, tmp_path, monkeypatch, how, record_property):
    swept = 0
    for at in points(whole, False):
        folder = tmp_path / str(at) / "run"
        folder.parent.mkdir()
        saved, _ = disturb(folder, how, at, monkeypatch)
        check(folder, whole, saved)
        shutil.rmtree(folder.parent)
        swept += 1
    assert swept == whole[1].count
    print(f"{how}: {swept} operations")


@pytest.mark.parametrize("lives", LIVES)
def test_a_power_cut_at_every_operation_loses_nothing_that_was_saved(whole, tmp_path, monkeypatch, lives):
    swept = 0
    for at in points(whole, False):
        folder = tmp_path / str(at) / "run"
        folder.parent.mkdir()
        saved, _ = disturb(folder, "power", at, monkeypatch, LIVES[lives])
        check(folder, whole, saved)
        shutil.rmtree(folder.parent)
        swept += 1
    assert swept == whole[1].count
    print(f"power, {lives} live: {swept} operations")
