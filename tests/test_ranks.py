"""Two processes give the same update as one, for every task; only the first writes; an accident of one ends all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker
import torch
from safetensors.torch import load_file

from tunewright import find
from tunewright.data.batches import Steps

TASKS = find.names("tasks")
WORKER = Path(__file__).parent / "ranks_worker.py"


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(WORKER.parent), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All tasks on nine rows: one process with batch 8, two with batch 4; then one run stopped and one that fails."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    ranks_worker.main(folder, "one", 8, TASKS)
    done = subprocess.run(
        [*torchrun, str(WORKER), str(folder), *TASKS],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert f"{TASKS[-1]} 2 " in done.stdout, done.stderr
    return folder, done


def test_there_are_tasks():
    assert len(TASKS) >= 3


@pytest.mark.promise(5)
@pytest.mark.parametrize("task", TASKS)
def test_c03_two_ranks_give_the_weights_of_one_process(runs, task, measured):
    folder, _ = runs
    one, two = (load_file(folder / task / place / "model" / "model.safetensors") for place in ("one", "two"))
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    measured(5, value=worst)
    assert worst <= 1e-5
    losses = [json.loads(line)["loss"] for line in (folder / task / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(set(losses)) == 3, "nothing moved"


@pytest.mark.parametrize("task", TASKS)
def test_what_is_logged_is_of_the_whole_step(runs, task):
    folder, _ = runs
    logs = [
        [json.loads(line) for line in (folder / task / place / "metrics.jsonl").read_text().splitlines()]
        for place in ("one", "two")
    ]
    assert [line["step"] for line in logs[1]] == [1, 2, 3], "one rank writes"
    for one, two in zip(*logs, strict=True):
        assert one["epoch"] == two["epoch"]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_every_held_out_row_is_answered_once_and_as_by_one_process(runs, task):
    folder, _ = runs
    one, two = (
        [json.loads(line) for line in (folder / task / place / "predictions.jsonl").read_text().splitlines()]
        for place in ("one", "two")
    )
    assert len(one) % 2 == 1 or len(one) % 3, "the last batch is uneven"
    assert [line["row"] for line in one] == [line["row"] for line in two]
    assert len({line["row"] for line in two}) == len(two)
    for a, b in zip(one, two, strict=True):
        for key, value in a["base"].items():
            assert b["base"][key] == (pytest.approx(value, abs=1e-5) if isinstance(value, (float, dict)) else value)


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_is_whole_says_how_many_worked_and_one_process_spoke(runs, task):
    folder, done = runs
    run = folder / task / "two"
    for name in ("README.md", "report.html", "evidence.json", "scores.parquet", "data.json", "recipe.yaml"):
        assert (run / name).is_file(), name
    assert not [p for p in run.rglob("*") if ".partial" in p.name or ".tmp-" in p.name]
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert done.stdout.count(f"{task} 2 {run}\n") == 1


def test_a_callback_on_the_first_rank_stops_all(runs):
    folder, _ = runs
    steps = (folder / TASKS[0] / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]
    assert (folder / TASKS[0] / "stopped" / "README.md").is_file()


def test_an_accident_of_one_rank_ends_all_with_its_reason(runs):
    folder, done = runs
    assert done.returncode != 0
    error = (folder / TASKS[0] / "fails" / "error.txt").read_text()
    assert "another process of this run stopped: process 1 of 2: an accident of this rank" in error
    assert "TrainError" in done.stderr, "the first rank says so in one sentence"


# ------------------------------------------------------------------- without processes
@pytest.mark.parametrize(
    ("n", "batch", "accumulation", "size"), [(9, 4, 1, 2), (10, 1, 3, 4), (7, 2, 2, 3), (3, 8, 1, 2)]
)
def test_c54_the_shares_of_a_step_are_its_micro_batches_each_once(n, batch, accumulation, size):
    def steps(share, accumulation):
        return Steps(
            [{"row": f"r{i}"} for i in range(n)], lambda e: [x["row"] for x in e], lambda e, rng: e, seed=0,
            batch_size=batch, accumulation=accumulation, epochs=2, max_steps=None, share=share,
        )  # fmt: skip

    whole = steps((0, 1), accumulation * size)
    shares = [steps((rank, size), accumulation) for rank in range(size)]
    assert {len(s) for s in shares} == {len(whole)}
    for i in range(len(whole)):
        parts = [s[i] for s in shares]
        assert sorted(map(tuple, whole[i])) == sorted(tuple(rows) for part in parts for rows in part)
        assert max(map(len, parts)) <= accumulation


def test_one_process_is_not_asked_to_meet_anybody(monkeypatch):
    from tunewright.engine import distributed

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.join()
    assert distributed.share() == (0, 1)
    assert not torch.distributed.is_initialized()
    assert distributed.split_rows([3, 1, 2], lambda rows: [10 * row for row in rows]) == [30, 10, 20]
    assert distributed.total({"a": 2.0}) == {"a": 2.0}
