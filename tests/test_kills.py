"""kill -9 at random moments, over tasks and methods: every run continues by itself and ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CELLS = (
    "text-classification/full",
    'text-classification/head/solver="steps"',
    "text-classification/layers/unfreeze=0.6",
    "text-classification/lora",
    "sft/lora",
    "image-classification/full",
)
WORKER = Path(__file__).parent / "kill_worker.py"


@pytest.mark.promise(1, 2)
def test_every_killed_run_continues_by_itself_and_ends_with_the_same_bytes(tmp_path, request, measured):
    kills = request.config.getoption("--kills")
    words = [sys.executable, str(WORKER), str(tmp_path), str(kills), str(os.getpid()), *CELLS]
    path = os.pathsep.join([str(WORKER.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    trials = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(trials) == kills >= len(CELLS)
    measured(1, got=sum(t["resumed"] for t in trials), of=kills)
    measured(2, got=sum(t["same"] for t in trials), of=kills)
    print(
        f"{sum(bool(t['saved']) for t in trials)} had a checkpoint, {sum(t['half_saves'] for t in trials)} half a save"
    )
    assert [t for t in trials if not (t["resumed"] and t["same"])] == []
