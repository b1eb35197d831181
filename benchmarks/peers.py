"""Ours against the peers on the same work, interleaved, every run a process of its own; one line per run is kept.

    python benchmarks/peers.py --work sft-lora-15m sft-lora-15m-bf16 --rounds 5
    python benchmarks/peers.py --environments runs/peers/environments     makes the peers' own environments
    python benchmarks/peers.py --table                                    writes the figures into docs/performance.md

A killed run loses only itself: rounds that are in peers.jsonl are not run again. One thread unless the work says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peer_data
import peer_table
from peer_works import OURS, WORKS, Work

HERE = Path(__file__).parent
KEPT = HERE / "peers.jsonl"
SOURCE = HERE.parent / "src"


# ------------------------------------------------------------------ one process
def prepare(work: Work, rows: int, folder: Path) -> dict[str, str]:
    """The files that every side reads, made once."""
    model, made = peer_data.write_model(folder, work.base), peer_data.write_rows(folder, rows)
    return {"model": str(model)} | {name: str(made / f"{name}.jsonl") for name in ("train", "test", "tokens", "spoken")}


def one(work: Work, side: str, rows: int, folder: Path, threads: int) -> None:
    """This process is one run of one side: its last line is what was measured."""
    import importlib

    from peer_meter import Meter

    inputs = prepare(work, rows, folder)
    who, _, configuration = side.partition("-")
    meter = Meter(threads)
    module = importlib.import_module("peer_ours" if who == OURS else f"peer_{who}")
    found = module.run(work, configuration, inputs, meter)
    count = sum(len(row["input_ids"]) for row in peer_data.read(inputs["tokens"]))
    meter.hand_over(**found, rows=rows, tokens=count * work.epochs)


# ------------------------------------------------------------------- all of them
def measure(
    names: list[str], rounds: int, rows: int | None, sides: list[str], folder: Path, environments: Path, results: Path
) -> None:
    """Round after round, in each every side of every work once; what is kept already is not run again."""
    for number in range(1, rounds + 1):
        for work in (WORKS[name] for name in names):
            count = rows or work.rows
            for side in [s for s in work.sides if not sides or s in sides]:
                key = {"work": work.name, "side": side, "round": number, "rows": count}
                if any(all(line.get(k) == v for k, v in key.items()) for line in kept(results)):
                    continue
                python = interpreter(side, environments)
                if python is None:
                    print(f"{work.name}, {side}: no environment; --environments makes it", file=sys.stderr)
                    continue
                found = started(work, side, count, folder, python) | key | {"precision": work.precision}
                if "error" not in found:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                told = found.get("error") or f"{found['cpu_s']:.2f} s CPU, {found['peak_mb']:.0f} MB"
                print(f"{work.name} {side} round {number}: {told}", file=sys.stderr, flush=True)


def kept(results: Path) -> list[dict[str, Any]]:
    """Runs that ended well; the others are tried again."""
    return peer_data.read(results) if results.exists() else []


def interpreter(side: str, environments: Path) -> str | None:
    """Who runs a side: this interpreter, or that of the side's own environment if it is there."""
    who = side.partition("-")[0]
    own = environments / who / "bin" / "python"
    if own.exists():
        return str(own)
    return sys.executable if who in (OURS, "trainer") else None


def started(work: Work, side: str, rows: int, folder: Path, python: str, threads: int = 1) -> dict[str, Any]:
    """One run as a process of its own, the CPU time of the whole of it beside what it says of itself."""
    words = [python, str(HERE / "peers.py"), "--one", side, "--work", work.name, "--rows", str(rows)]
    words += ["--folder", str(folder), "--threads", str(threads)]
    quiet = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder / f"{work.name}-{side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    began = time.time()
    with log.open("w+", encoding="utf-8") as err, (log.with_suffix(".out")).open("w+", encoding="utf-8") as out:
        process = subprocess.Popen(words, stdout=out, stderr=err, env=os.environ | quiet | {"PYTHONPATH": path})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        lines, faults = out.read().splitlines(), err.read()
    whole = {"whole_cpu_s": usage.ru_utime + usage.ru_stime, "whole_wall_s": time.time() - began}
    if process.returncode != 0:
        return whole | {"error": faults[-600:]}
    return json.loads(lines[-1]) | whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=[], metavar="NAME", help=", ".join(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="training rows; default: what the work says")
    parser.add_argument("--sides", nargs="+", default=[], help="only these")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="where models, rows and logs are made")
    parser.add_argument("--environments", type=Path, default=Path("runs/peers/environments"))
    parser.add_argument("--results", type=Path, default=KEPT, help="where a line per run is kept")
    parser.add_argument("--table", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if asked.one:
        one(WORKS[asked.work[0]], asked.one, asked.rows, folder, asked.threads)
    elif asked.table:
        peer_table.write(kept(asked.results))
    else:
        measure(asked.work, asked.rounds, asked.rows, asked.sides, folder, asked.environments.resolve(), asked.results)


if __name__ == "__main__":
    main()
