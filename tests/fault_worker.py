"""Runs `tunewright` commands in forked children: one import for all, so that a start costs a moment.

Reads JSON lines: {"words": [...], "env": {...}, "out": FILE} starts a command and answers with its process id,
{"wait": PID} answers with its exit code. {"here": [...]} runs a command in this process, which then has imported all
that its children need.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

import fault_tasks
import torch

from tunewright import cli
from tunewright.engine import checkpoint
from tunewright.runs import training
from tunewright.runs.evidence import gather  # noqa: F401  (imported once, before any fork)

# one core, so one thread: a pool of threads does not survive a fork
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
torch.set_num_threads(1)


def waits(module: object, name: str) -> None:
    real = getattr(module, name)

    def call(*args, **kwargs):
        fault_tasks.moment(name)
        return real(*args, **kwargs)

    setattr(module, name, call)


waits(checkpoint, "_write")
waits(training, "_answers")
waits(training, "write_report")


def start(words: list[str], env: dict[str, str], out: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(env)
        fault_tasks.calls.clear()  # those of the run in this process
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = cli.main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "here" in asked:
            with contextlib.redirect_stdout(sys.stderr):
                code = cli.main(asked["here"])
            print(code, flush=True)
        elif "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        else:
            print(start(**asked), flush=True)
