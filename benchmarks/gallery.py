"""Real runs, tuned well and badly on purpose: does the verdict tell the one from the other?

    python benchmarks/gallery.py data --shared ../shared      # rows for all recipes, into runs/gallery/data
    python benchmarks/gallery.py run                          # every recipe in docs/gallery; what is done is left out
    python benchmarks/gallery.py table                        # docs/gallery/README.md, figures.json, tickets.html

Sentences are SST-2, photographs are ants and bees, plays are Shakespeare; where they come from stands in docs/gallery.
Knows the command line and the run folder; what a verdict ought to be stands here before it is seen (`EXPECTED`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GALLERY, RUNS = ROOT / "docs/gallery", ROOT / "runs/gallery"
NEGATION = re.compile(r"\b(not|n't|no|never|nothing|without|neither|nor)\b")
# recipe -> (what was done to it, the answers of the verdict that would be right, written down before its first run);
# () where any answer would have done, or where the recipe was made after an answer like it had been seen
EXPECTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "tickets": ("the demo's 600 tickets, LoRA", ()),
    "sentences-well": ("LoRA as recommended", ("better",)),
    "sentences-rate-x10": ("ten times the learning rate", ()),
    "sentences-epochs": ("200 rows seen 30 times, all weights", ("better", "can't tell")),
    "sentences-shuffled": ("labels shuffled", ("can't tell", "no meaningful change", "worse")),
    "sentences-group-left-out": ("no training row that is short and negative", ()),
    "photos-well": ("a new head on a small network; the labels are German, which it does not speak", ()),
    "photos-known": ("English labels, which it names without training", ()),
    "photos-shuffled": ("English labels, shuffled", ("can't tell", "no meaningful change", "worse")),
    "photos-rate-x10": ("all weights of a network that knows both, ten times the rate", ("worse",)),
    "plays-rate-1e-4": ("a story teller on plays, all weights, rate 1e-4", ("trade", "better")),
    "plays-rate-3e-4": ("rate 3e-4", ("trade",)),
    "plays-rate-1e-3": ("rate 1e-3", ("trade",)),
    "plays-rate-1e-2": ("rate 1e-2, ten times too high", ("trade", "worse")),
}  # fmt: skip


def make_data(shared: Path) -> None:
    """The rows of every recipe; drawn with one seed, so that a second call writes the same bytes."""
    folder = RUNS / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)  # noqa: S311  draws rows, hides nothing
    train, test, validation = (_sentences(shared, name) for name in ("train", "test", "validation"))
    for rows in (train, test, validation):
        rng.shuffle(rows)
    labels = [row["label"] for row in train[:2000]]
    rng.shuffle(labels)
    lopsided = [row for row in train if (row["length"], row["label"]) != ("short", "negative")][:2000]
    parts = {
        "sentences": train[:2000], "sentences-few": train[:200], "sentences-lopsided": lopsided,
        "sentences-shuffled": [row | {"label": label} for row, label in zip(train, labels, strict=False)],
        "sentences-test": test[:500], "sentences-validation": validation[:300],
    }  # fmt: skip
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _photos(shared / "data/hymenoptera", folder, rng)
    texts = (
        ("plays", "shakespeare/train.txt", 260_000),
        ("plays-test", "shakespeare/test.txt", 100_000),
        ("stories", "tinystories/stories.txt", 60_000),
    )
    for name, source, size in texts:
        text = (shared / "data" / source).read_text(encoding="utf-8")[:size]
        (folder / f"{name}.txt").write_text(text.rpartition("\n")[0] + "\n", encoding="utf-8")
    for model in ("mobilenet_v1_0.25_128", "mobilenet_v2_1.0_224", "stories260k"):
        link = RUNS / "models" / model
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((shared / "models" / model).resolve())


def _sentences(shared: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (shared / f"data/sst2/{name}.jsonl").read_text().splitlines()]
    names = ("negative", "positive")
    return [
        {
            "text": row["text"], "label": names[row["label"]],
            "negation": "yes" if NEGATION.search(row["text"]) else "no",
            "length": "long" if len(row["text"].split()) > 18 else "short",
        }
        for row in rows
    ]  # fmt: skip


def _photos(source: Path, folder: Path, rng: random.Random) -> None:
    """Class folders, and a copy of the training ones in which each picture lies in a class drawn at random."""
    for part in ("train", "val"):
        shutil.copytree(source / part, folder / f"photos-{part}", dirs_exist_ok=True)
        for name, german in (("ants", "Ameisen"), ("bees", "Bienen")):
            shutil.copytree(source / part / name, folder / f"photos-german-{part}" / german, dirs_exist_ok=True)
    files = sorted((source / "train").glob("*/*"))
    names = [path.parent.name for path in files]
    rng.shuffle(names)
    shutil.rmtree(folder / "photos-shuffled", ignore_errors=True)
    for path, name in zip(files, names, strict=True):
        target = folder / "photos-shuffled" / name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def run(names: list[str]) -> None:
    """One `tunewright train` after the other; a finished run is asked only for the gauges that it lacks."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    for name in names:
        out = RUNS / name
        words = ["evaluate", str(out), "--gauges"] if (out / "report.html").is_file() else [
            "train", str(GALLERY / f"{name}.yaml"), f"output_dir={out}"
        ]  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "tunewright", *words], env=environment, text=True,
                              capture_output=True, check=False)  # fmt: skip
        said = done.stderr.strip().splitlines()
        print(f"{name}: exit {done.returncode}; {said[-2] if len(said) > 1 else said}", flush=True)


def figures(name: str) -> dict[str, Any]:
    """What the verdict said, and the numbers beside it."""
    out = RUNS / name
    evidence = json.loads((out / "evidence.json").read_text())
    verdict, measures = evidence["verdict"], evidence["measures"]
    gauges = {path.stem: json.loads(path.read_text()) for path in sorted((out / "gauges").glob("*.json"))}
    return {
        "recipe": name,
        "done": EXPECTED[name][0],
        "answer": verdict["answer"],
        "as_expected": verdict["answer"] in EXPECTED[name][1] if EXPECTED[name][1] else None,
        "sentence": verdict["sentence"],
        "measures": [
            {k: m.get(k) for k in ("name", "about", "set", "n", "base", "tuned", "difference", "ci95")}
            for m in measures
            if m["name"] in ("accuracy", "perplexity", "loss", "cross_entropy") or m is measures[0]
        ],
        "said": {k: g["sentence"] for k, g in gauges.items() if g.get("sentence")},
        "seconds": {
            "training": round(evidence["cost"]["train_seconds"], 1),
            **{k: g["seconds"] for k, g in gauges.items() if "seconds" in g},
        },
    }


def table() -> None:
    """figures.json, and the lines of the table in README.md between its two marks."""
    found = [figures(name) for name in EXPECTED if (RUNS / name / "report.html").is_file()]
    (GALLERY / "figures.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    lines = ["| run | what was done | the verdict said | as expected |", "|---|---|---|---|"]
    for one in found:
        right = {True: "yes", False: "**no**", None: "nothing expected"}[one["as_expected"]]
        lines.append(f"| [{one['recipe']}]({one['recipe']}.yaml) | {one['done']} | {one['sentence']} | {right} |")
    readme = GALLERY / "README.md"
    start, end = "<!-- table -->\n", "<!-- end -->"
    text = readme.read_text() if readme.is_file() else f"# Gallery\n\n{start}{end}\n"
    before, _, rest = text.partition(start)
    readme.write_text(before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2])
    print("\n".join(lines))


def page(name: str) -> None:
    """A run's whole report, with places named from the repository's root: for rows that we wrote ourselves alone."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        shutil.copytree(RUNS / name, copy, ignore=shutil.ignore_patterns("checkpoints", "model"))
        recipe = copy / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(f"{ROOT}/", ""))
        subprocess.run([sys.executable, "-m", "tunewright", "report", str(copy)], check=True, capture_output=True)
        shutil.copy(copy / "report.html", GALLERY / f"{name}.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("data").add_argument("--shared", type=Path, required=True)
    verbs.add_parser("run").add_argument("names", nargs="*", metavar="NAME")
    verbs.add_parser("table")
    options = parser.parse_args()
    if options.verb == "data":
        make_data(options.shared)
    elif options.verb == "run":
        run(options.names or list(EXPECTED))
    else:
        table()
        page("tickets")


if __name__ == "__main__":
    main()
