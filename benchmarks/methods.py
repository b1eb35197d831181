"""Every method on the same rows: accuracy with interval, share of trainable numbers, time, memory; and from scratch.

    python benchmarks/methods.py run text --shared ../shared --out runs/methods --jobs 2
    python benchmarks/methods.py run images --shared ../shared --out runs/methods --jobs 2
    python benchmarks/methods.py table

Each cell (method, rows, seed) is one `tunewright train` in a process of its own with one thread, so that its processor
time and its peak memory are its own; a second start leaves out what is done. The training rows of a seed are the same
for all methods. Knows the command line and the run folder; nothing of how a method works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).with_suffix(".jsonl")  # one line a cell, with right and wrong of every held-out row
RESAMPLES = 10_000
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TRAIN = ["train.per_device_train_batch_size=16", "train.save_steps=100000", "train.warmup_steps=0.06"]
# name -> keys. Rates are the methods' own; a model from scratch wants a larger one than full tuning.
COMMON: dict[str, list[str]] = {
    "head": ["method=head"],
    "full": ["method=full"],
    "full, L2-SP": ["method=full", "method.l2_sp=100"],
    "layers: last 2 blocks": ["method=layers", "method.last=2"],
    "layers: discriminative": ["method=discriminative"],
    "layers: gradual unfreezing": ["method=gradual-unfreezing"],
    "layers: slow unfreezing": ["method=layers", "method.unfreeze=0.9", "method.layer_decay=0.385"],
    "layers: biases (BitFit)": ["method=bitfit"],
    "layers: head first (LP-FT)": ["method=lp-ft"],
    "lora": ["method=lora"],
    "lora, DoRA": ["method=dora"],
    "bottleneck": ["method=bottleneck"],
    "ia3": ["method=ia3"],
    "sparse": ["method=sparse"],
}
TEXT_ONLY: dict[str, list[str]] = {
    "lora, PiSSA": ["method=lora", "method.init_lora_weights=pissa"],
    "qlora": ["method=qlora"],
    "bottleneck, Pfeiffer": ["method=bottleneck", "method.placement=pfeiffer"],
    "bottleneck, parallel": ["method=bottleneck", "method.placement=parallel"],
    "prefix": ["method=prefix"],
    "prompt": ["method=prompt"],
}


@dataclass(frozen=True)
class Setting:
    """One base with its data: keys every run shares, and how many passes each number of rows gets."""

    keys: list[str]
    epochs: dict[int, int]
    methods: dict[str, list[str]]
    scratch: list[str]


def text_setting(shared: Path, out: Path) -> Setting:
    """SST-2 with the MiniLM encoder; scored on its 872 validation sentences, as GLUE does."""
    rows = [json.loads(line) for line in (shared / "data/sst2/train.jsonl").read_text().splitlines()]
    for n in (100, 1000):
        for seed in SEEDS:
            chosen = balanced([r["label"] for r in rows], n, seed)
            text = "".join(json.dumps(rows[i]) + "\n" for i in chosen)
            place(out / "data" / f"text-{n}-{seed}.jsonl").write_text(text)
    test = shared / "data/sst2/validation.jsonl"
    keys = ["task=text-classification", "task.max_length=64", f"data.test={test}"]
    blank = scratch_base(out / "bases/text", MINILM, "AutoModel", "AutoTokenizer")
    scratch = ["method=full", f"model={blank}", "train.learning_rate=3e-4"]
    return Setting([f"model={MINILM}", *keys], {100: 10, 1000: 3}, COMMON | TEXT_ONLY, scratch)


def image_setting(shared: Path, out: Path) -> Setting:
    """Ants and bees with MobileNetV2 at 160 pixels; scored on the 153 validation photographs."""
    source = shared / "data/hymenoptera/train"
    files = sorted(p for p in source.rglob("*.jpg"))
    for n in (100, len(files)):
        for seed in SEEDS:
            folder = out / "data" / f"images-{n}-{seed}"
            if folder.exists():
                continue
            for i in balanced([f.parent.name for f in files], n, seed):
                shutil.copy(files[i], place(folder / files[i].parent.name / files[i].name))
    base = smaller(shared / "models/mobilenet_v2_1.0_224", out / "bases/mobilenet-160", 160)
    keys = ["task=image-classification", f"data.test={shared / 'data/hymenoptera/val'}"]
    blank = scratch_base(out / "bases/images", str(base), "AutoModelForImageClassification", "AutoImageProcessor")
    scratch = ["method=full", f"model={blank}", "train.learning_rate=1e-3", "train.train_batch_norm=true"]
    return Setting([f"model={base}", *keys], {100: 6, len(files): 4}, COMMON, scratch)


def balanced(labels: list[Any], n: int, seed: int) -> list[int]:
    """n places, classes in equal numbers as far as they reach, in a random order of their own."""
    order = np.random.default_rng([seed, n]).permutation(len(labels))
    ranks: dict[Any, int] = {}
    keyed = []
    for i in order:
        ranks[labels[i]] = ranks.get(labels[i], -1) + 1
        keyed.append((ranks[labels[i]], len(keyed), int(i)))
    return [i for _, _, i in sorted(keyed)[:n]]


def place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def scratch_base(folder: Path, checkpoint: str, auto_class: str, processor: str) -> Path:
    """The same architecture with random weights, drawn once."""
    if not (folder / "config.json").exists():
        import torch
        import transformers

        from tunewright.models.load import resolve
        from tunewright.recipe import ModelSpec

        found, _ = resolve(ModelSpec(checkpoint))
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(found)
        getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
        getattr(transformers, processor).from_pretrained(found).save_pretrained(folder)
    return folder


def smaller(base: Path, folder: Path, pixels: int) -> Path:
    """The same checkpoint with smaller pictures: a third of the time, and time is what is short."""
    if not folder.exists():
        shutil.copytree(base, folder)
        file = folder / "preprocessor_config.json"
        settings = json.loads(file.read_text())
        settings["crop_size"] = {"height": pixels, "width": pixels}
        settings["size"] = {"shortest_edge": round(pixels * 256 / 224)}
        file.write_text(json.dumps(settings, indent=1))
    return folder


# ---------------------------------------------------------------------- running
def run(kind: str, shared: Path, out: Path, jobs: int, only: list[str], seeds: list[int], rows: list[int]) -> None:
    """All cells that are not in methods.jsonl yet, `jobs` at a time."""
    out.mkdir(parents=True, exist_ok=True)
    setting = {"text": text_setting, "images": image_setting}[kind](shared.resolve(), out.resolve())
    results = RESULTS
    done = {(r["kind"], r["method"], r["rows"], r["seed"]) for r in read(results)}
    cells = [
        (name, n, seed)
        for seed in seeds
        for n in setting.epochs
        for name in [*setting.methods, "from scratch"]
        if (kind, name, n, seed) not in done and (not only or name in only) and (not rows or n in rows)
    ]
    print(f"{len(cells)} cells to run, {len(done)} done", file=sys.stderr)

    def one(cell: tuple[str, int, int]) -> None:
        began = time.time()
        found = train(kind, setting, *cell, out.resolve())
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        told = found.get("accuracy", found.get("error", ""))
        print(f"{cell}: {told} ({time.time() - began:.0f} s)", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, cells))


def train(kind: str, setting: Setting, name: str, n: int, seed: int, out: Path) -> dict[str, Any]:
    """One cell: a process of its own, then what its run folder says."""
    data = out / "data" / (f"{kind}-{n}-{seed}" + (".jsonl" if kind == "text" else ""))
    folder = out / "cells" / f"{kind}-{n}-{seed}-{''.join(c if c.isalnum() else '-' for c in name)}"
    shutil.rmtree(folder, ignore_errors=True)
    keys = [*setting.keys, *TRAIN, f"data.train={data}", f"seed={seed}", f"train.num_train_epochs={setting.epochs[n]}"]
    keys += setting.scratch if name == "from scratch" else setting.methods[name]
    keys = list({key.partition("=")[0]: key for key in keys}.values())  # the last one counts
    command = [sys.executable, "-m", "tunewright", "train", *keys, f"output_dir={folder}"]
    cell = {"kind": kind, "method": name, "rows": n, "seed": seed}
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with place(folder.with_suffix(".log")).open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=os.environ | threads)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        return cell | {"error": folder.with_suffix(".log").read_text()[-400:]}
    return cell | measured(folder) | {"cpu_seconds": usage.ru_utime + usage.ru_stime}


def measured(folder: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    evidence = json.loads((folder / "evidence.json").read_text())
    lines = [x for x in pq.read_table(folder / "scores.parquet").to_pylist() if x["metric"] == "accuracy"]
    right = "".join(str(int(x["tuned"])) for x in sorted(lines, key=lambda x: x["row"]))
    size = sum(p.stat().st_size for p in (folder / "model").rglob("*.safetensors"))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    return {
        "accuracy": evidence["measures"][0]["tuned"], "base": evidence["measures"][0]["base"], "right": right,
        "saved_bytes": size, **evidence["cost"],
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """Finished cells; those that failed are tried again."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "error" not in line]


# ----------------------------------------------------------------------- table
def table() -> str:
    """Markdown, one table for each base."""
    results = read(RESULTS)
    parts = []
    for kind in dict.fromkeys(r["kind"] for r in results):
        own = [r for r in results if r["kind"] == kind]
        sizes = sorted({r["rows"] for r in own})
        head = ["method", "trains, %"]
        for n in sizes:
            head += [f"accuracy, {n} rows", "against full", "CPU s"]
        lines = ["| " + " | ".join([*head, "peak, GiB"]) + " |", "|" + "---|" * (len(head) + 1)]
        names = sorted(
            {r["method"] for r in own}, key=lambda m: -np.mean([r["accuracy"] for r in own if r["method"] == m])
        )
        for name in names:
            mine = [r for r in own if r["method"] == name]
            share = 100 * mine[0]["trainable_parameters"] / mine[0]["total_parameters"]
            line = [name, f"{share:.2g}" if share < 99.95 else "100"]
            for n in sizes:
                cells, full = ([r for r in own if r["rows"] == n and r["method"] == m] for m in (name, "full"))
                line += accuracy_cell(cells, full)
            peak = np.median([r["peak_memory_bytes"] for r in mine]) / 2**30
            lines.append("| " + " | ".join([*line, f"{peak:.1f}"]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def accuracy_cell(cells: list[dict[str, Any]], full: list[dict[str, Any]]) -> list[str]:
    """Mean of the seeds with its interval, the difference to full with its interval, and processor seconds."""
    if not cells:
        return ["-", "-", "-"]
    low, high = interval(bits(cells))
    each = " ".join(f"{100 * r['accuracy']:.1f}" for r in sorted(cells, key=lambda r: r["seed"]))
    mean = 100 * np.mean([r["accuracy"] for r in cells])
    own = f"**{mean:.1f}** ({100 * low:.1f} to {100 * high:.1f}; {each})"
    both = sorted({r["seed"] for r in cells} & {r["seed"] for r in full})
    versus = "-"
    if both and cells[0]["method"] != "full":
        pair = [bits([r for r in side if r["seed"] in both]) for side in (cells, full)]
        gap = pair[0] - pair[1]
        low, high = interval(gap)
        versus = f"{100 * gap.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return [own, versus, f"{np.median([r['cpu_seconds'] for r in cells]):.0f}"]


def bits(cells: list[dict[str, Any]]) -> np.ndarray:
    """(seeds, rows) of 0 and 1."""
    return np.array([[int(c) for c in r["right"]] for r in sorted(cells, key=lambda r: r["seed"])], dtype=float)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the mean over (seeds, rows): rows and seeds both drawn anew, since both were chance."""
    rng = np.random.default_rng(0)
    seeds, rows = values.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        columns = values[:, rng.integers(0, rows, rows)].mean(1)
        means[i] = columns[rng.integers(0, seeds, seeds)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("kind", nargs="?", choices=("text", "images"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    parser.add_argument("--rows", nargs="*", type=int, default=[], help="numbers of training rows; none: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    options = parser.parse_args()
    if options.what == "run":
        run(options.kind, options.shared, options.out, options.jobs, options.only, options.seeds, options.rows)
    else:
        print(table())


if __name__ == "__main__":
    main()
