"""Under LD_PRELOAD of kill_at_syscall.c: a run is killed at each of its file system calls in turn, and started again.

LD_PRELOAD=kill_at_syscall.so python tests/syscall_worker.py FOLDER     prints how many kills there were
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from test_save_sweep import check, state_of, train

shim = ctypes.CDLL(None)


def start(folder: Path, number: int) -> int:
    """Fork a child that runs, to be killed at that call (0: never); its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        shim.arm(os.fsencode(folder.parent), ctypes.c_long(number))
        train(folder)
        code = 0
    finally:
        os._exit(code)


def main(where: Path) -> None:
    torch.set_num_threads(1)
    kept: dict[int, float] = {}
    train(where / "kept" / "run", kept)
    assert start(where / "whole" / "run", 0) == 0
    files = state_of(where / "whole" / "run")
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        folder = where / "killed" / "run"
        folder.parent.mkdir()
        code = start(folder, number)
        check(folder, (None, files, None, kept), 0)
        shutil.rmtree(folder.parent)
    assert code == 0
    print(number - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
