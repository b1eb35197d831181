"""Ours against the peers on the same work, interleaved, every run a process of its own; one line per run is kept.

    python benchmarks/peers.py --environments runs/peers/environments     makes the peers' own environments
    python benchmarks/peers.py --work sft-lora-15m sft-lora-15m-bf16 --rounds 5
    python benchmarks/peers.py --work cls-head img-full-vit --shared FOLDER     works on real rows: see peer_real.py
    python benchmarks/peers.py --table                                    writes the figures into docs/performance.md

A killed run loses only itself: rounds that are in peers.jsonl are not run again. One thread unless the work says so.
The machine's own ceilings are measured in every round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peer_data
import peer_environments
import peer_real
from peer_works import BESIDE, OURS, WORKS, Work

HERE = Path(__file__).parent
KEPT = HERE / "peers.jsonl"
SOURCE = HERE.parent / "src"
MACHINE = "machine"  # the side that is no trainer: what the processor and the memory can do
SPIN = "while True: sum(range(10**6))"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where things lie. rows: of every work; None: what each says."""

    folder: Path
    environments: Path
    results: Path
    shared: Path | None = None
    rows: int | None = None


# ------------------------------------------------------------------ one process
def inputs_of(work: Work, rows: int, bench: Bench) -> dict[str, str]:
    """The files that every side reads, made once."""
    if work.kind == "sft":
        model, made = peer_data.write_model(bench.folder, work.base), peer_data.write_rows(bench.folder, rows)
        return {"model": str(model)} | {name: str(made / f"{name}.jsonl") for name in peer_data.FILES}
    if bench.shared is None:
        raise SystemExit(f"{work.name} learns from real rows: --shared FOLDER (see peer_real.py)")
    if work.kind == "cls":
        return peer_real.sentences(bench.shared, bench.folder, rows)
    return peer_real.photographs(bench.shared, bench.folder, work.base, rows)


def one(work: Work, side: str, rows: int, bench: Bench) -> None:
    """This process is one run of one side: its last line is what was measured."""
    import importlib

    who, _, configuration = side.partition("-")
    if who == OURS:
        importlib.import_module(OURS)  # before torch, as its own command does: it says how threads wait
    if who == MACHINE:
        import peer_ceilings

        return peer_ceilings.run(work)
    from peer_meter import Meter

    inputs = inputs_of(work, rows, bench)
    meter = Meter(work.threads)
    module = importlib.import_module("peer_ours" if who == OURS else f"peer_{who}")
    found = module.run(work, configuration, inputs, meter)
    if work.kind == "sft":
        found["tokens"] = work.epochs * sum(len(row["input_ids"]) for row in peer_data.read(inputs["tokens"]))
    return meter.hand_over(**found)


# ------------------------------------------------------------------- all of them
def measure(names: list[str], rounds: int, sides: list[str], bench: Bench) -> None:
    """Round after round, in each every side of every work once; what is kept already is not run again."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, rounds + 1):
        for work in (WORKS[name] for name in names):
            rows = bench.rows or work.rows
            inputs_of(work, rows, bench)
            for side in [s for s in sides_of(work) if not sides or s in sides]:
                key = {"work": work.name, "side": side, "round": number, "rows": rows}
                if any(all(line.get(k) == v for k, v in key.items()) for line in kept(bench.results)):
                    continue
                python = peer_environments.interpreter(side, bench.environments)
                if python is None:
                    print(f"{work.name}, {side}: no environment; --environments makes it", file=sys.stderr)
                    continue
                with rivals(BESIDE.get(side.rpartition("-")[2], 0)):
                    found = started(work, side, rows, bench, python) | key | {"precision": work.precision}
                if "error" not in found:
                    with bench.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                print(f"{work.name} {side} round {number}: {told(found)}", file=sys.stderr, flush=True)


def sides_of(work: Work) -> tuple[str, ...]:
    """The machine's ceilings are measured where FLOPs can be counted by hand."""
    return (*work.sides, MACHINE) if work.kind == "sft" and work.threads == 1 else work.sides


def kept(results: Path) -> list[dict[str, Any]]:
    """Runs that ended well; the others are tried again."""
    return peer_data.read(results) if results.exists() else []


def told(found: dict[str, Any]) -> str:
    if "cpu_s" in found:
        return f"{found['cpu_s']:.2f} s CPU, {found['wall_s']:.2f} s, {found['peak_mb']:.0f} MB"
    return str(found.get("error") or found.get("gflops"))


def started(work: Work, side: str, rows: int, bench: Bench, python: str) -> dict[str, Any]:
    """One run as a process of its own, the CPU time of the whole of it beside what it says of itself."""
    words = [python, str(HERE / "peers.py"), "--one", side, "--work", work.name, "--rows", str(rows)]
    words += ["--folder", str(bench.folder), "--environments", str(bench.environments)]
    words += ["--shared", str(bench.shared)] if bench.shared else []
    log = bench.folder / f"{work.name}-{side}"
    began = time.perf_counter()
    with log.with_suffix(".err").open("w") as err, log.with_suffix(".out").open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=err, env=surroundings(work, side, bench))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    whole = {"whole_cpu_s": usage.ru_utime + usage.ru_stime, "whole_wall_s": time.perf_counter() - began}
    if process.returncode != 0:
        return whole | {"error": log.with_suffix(".err").read_text()[-600:]}
    return json.loads(log.with_suffix(".out").read_text().splitlines()[-1]) | whole


def surroundings(work: Work, side: str, bench: Bench) -> dict[str, str]:
    """Environment of a run: its threads, and a cache of ours that only a side called warm finds filled."""
    cache = bench.folder / f"cache-{work.name}"
    if "-warm" not in side:
        shutil.rmtree(cache, ignore_errors=True)
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    found |= {"TUNEWRIGHT_CACHE_DIR": str(cache)}
    found.pop("OMP_NUM_THREADS", None)
    return found | ({"OMP_NUM_THREADS": str(work.threads)} if work.threads else {})


@contextlib.contextmanager
def rivals(count: int) -> Iterator[None]:
    """So many processes that never rest, for as long as this lasts."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=[], metavar="NAME", help=", ".join(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="training rows; default: what the work says")
    parser.add_argument("--sides", nargs="+", default=[], help="only these")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="where models, rows and logs are made")
    parser.add_argument("--shared", type=Path, help="folder with data/ and models/")
    parser.add_argument("--environments", type=Path, help="the peers' own; without --work they are made there")
    parser.add_argument("--results", type=Path, default=KEPT, help="where a line per run is kept")
    parser.add_argument("--table", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    environments = (asked.environments or folder / "environments").resolve()
    shared = asked.shared.resolve() if asked.shared else None
    bench = Bench(folder, environments, asked.results, shared, asked.rows)
    if asked.one:
        one(WORKS[asked.work[0]], asked.one, asked.rows, bench)
    elif asked.work:
        measure(asked.work, asked.rounds, asked.sides, bench)
    elif asked.environments:
        peer_environments.make(environments)
    if asked.table:
        import peer_table

        peer_table.write(kept(bench.results))


if __name__ == "__main__":
    main()
