"""Signals and a second process in the folder: the step is saved, the same command continues to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tree, write_text_rows
from fault_runs import HERE, SHORT, bytes_of, newest


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


SCRIPT = "import sys, tunewright; tunewright.train(sys.argv[2], output_dir=sys.argv[3].partition('=')[2])"


@pytest.mark.parametrize("how", [["-m", "tunewright"], ["-c", SCRIPT]], ids=["command", "script"])
def test_the_program_itself_leaves_with_143(slow, tmp_path, how):
    """Without any of the test's machinery: the command, and a script that catches nothing, get SIGTERM."""
    words, _ = slow
    mark, out = tmp_path / "mark", tmp_path / "run"
    path = os.pathsep.join([str(HERE), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WAIT_AT": f"loss:5:0.5:{mark}"}
    command = [sys.executable, *how, *map(str, words(out))]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not mark.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Saved after step 5 of 12" in said
    assert "Traceback" not in said
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
