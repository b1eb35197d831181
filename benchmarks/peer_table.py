"""The tables of docs/performance.md, made from peers.jsonl alone. Knows no trainer and measures nothing.

The peer to beat is, work by work, the side of another trainer with the lowest median (of memory: its own lowest);
ratios are taken round by round, both sides of a ratio being of the same round. A work that was run with several
numbers of rows has a line for each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peer_ceilings import flops_of
from peer_works import BESIDE, LENT, OURS, REORDERED, SIDES, UNEQUAL, WORKS, Work

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- peers: made by benchmarks/peers.py --table -->", "<!-- peers: end -->"
AGREE = 1e-3  # of the initial loss, float32
Line = dict[str, Any]


def write(lines: list[Line], page: Path = PAGE) -> None:
    """Put the tables between the two markers of the page."""
    text = page.read_text(encoding="utf-8")
    head, found, rest = text.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"{page.name} has no place for the tables: {BEGIN} ... {END}")
    page.write_text(f"{head}{BEGIN}\n\n{tables(lines)}\n\n{END}{tail}", encoding="utf-8")


def tables(lines: list[Line]) -> str:
    """Markdown: the machine, the figures against their targets, then every work with all its sides."""
    groups = [Group(work, rows, lines) for work in WORKS.values() for rows in rows_of(work, lines)]
    parts = [machines(lines), figures(groups), ceilings(groups), *(detail(group) for group in groups)]
    return "\n\n".join(part for part in parts if part)


def rows_of(work: Work, lines: list[Line]) -> list[int]:
    return sorted({line["rows"] for line in lines if line["work"] == work.name and "cpu_s" in line})


class Group:
    """All runs of one work on one number of rows."""

    def __init__(self, work: Work, rows: int, lines: list[Line]) -> None:
        self.work, self.rows = work, rows
        own = [line for line in lines if line["work"] == work.name and line["rows"] == rows]
        self.machine = [line for line in own if "gflops" in line]
        names = dict.fromkeys([*work.sides, *(line["side"] for line in own)])
        runs = {side: {x["round"]: x for x in own if x["side"] == side and "cpu_s" in x} for side in names}
        self.runs = {side: found for side, found in runs.items() if found}

    def values(self, side: str, key: str) -> list[float]:
        return [line[key] for line in self.runs.get(side, {}).values() if line.get(key) is not None]

    def middle(self, side: str, key: str) -> float:
        return statistics.median(self.values(side, key))

    def best(self, key: str = "cpu_s") -> str | None:
        """The fastest side of another trainer that does the same arithmetic."""
        peers = [s for s in self.runs if not s.startswith(OURS) and s not in UNEQUAL and LENT not in s]
        return min(peers, key=lambda side: self.middle(side, key), default=None)

    def ratios(self, slow: str, quick: str, key: str = "cpu_s") -> list[float]:
        """slow / quick in every round that has both."""
        first, second = self.runs.get(slow, {}), self.runs.get(quick, {})
        return [first[r][key] / second[r][key] for r in sorted(first.keys() & second.keys()) if second[r][key]]


# --------------------------------------------------------------------- figures
def figures(groups: Iterable[Group]) -> str:
    """Every target, what was reached, and whether that is enough."""
    rows = [row for group in groups for row in claims(group)]
    head = ("work", "rows", "rounds", "measured", "against", "times", "at least", "reached", "accuracy of both")
    return table(head, rows)


def claims(group: Group) -> list[list[str]]:
    work = group.work
    if work.slower:
        return [claim(group, f"{who}-{where}", f"{who}-alone", work.slower, "wall_s", "at most")
                for where in BESIDE for who in (OURS, "trainer") if f"{who}-{where}" in group.runs]  # fmt: skip
    if f"{OURS}-cold" in group.runs:
        pairs = [pair for pair in PAIRS if pair[0] in group.runs]
        return [claim(group, cold, warm, work.target, key) for key in ("cpu_s", "whole_cpu_s") for warm, cold in pairs]
    best = group.best()
    found = [claim(group, best, side, work.target, "cpu_s") for side in group.runs if side.startswith(OURS) and best]
    if work.memory and best:
        found += [claim(group, side, group.best("peak_mb"), work.memory, "peak_mb", "at most")
                  for side in group.runs if side.startswith(OURS)]  # fmt: skip
    return found


PAIRS = (
    (f"{OURS}-warm-seed", f"{OURS}-cold"),
    (f"{OURS}-warm-layers", f"{OURS}-cold-layers"),
)


def claim(
    group: Group, upper: str | None, lower: str | None, target: float | None, key: str, sense: str = "at least"
) -> list[str]:
    """One line: the ratio upper / lower. Ours stands on whichever side it is."""
    assert upper is not None
    assert lower is not None
    ratios = group.ratios(upper, lower, key)
    value = statistics.median(ratios) if ratios else None
    enough = value is not None and target is not None and (value >= target if sense == "at least" else value <= target)
    ours, other = (lower, upper) if sense == "at least" else (upper, lower)
    told = {"cpu_s": "", "whole_cpu_s": ", whole process", "wall_s": ", wall s", "peak_mb": ", peak MB"}[key]
    right = " / ".join(shown(group.values(side, "accuracy"), 3) for side in (ours, other))
    bound = f"{'' if sense == 'at least' else '<= '}{target:g}" if target else ""
    reached = "" if not target or not ours.startswith(OURS) else "yes" if enough else "**no**"
    return [
        group.work.name + told, f"{group.rows}", f"{len(ratios)}",
        *(f"{side}: {shown(group.values(side, key))}" for side in (ours, other)), shown(ratios), bound, reached,
        right if group.values(ours, "accuracy") and key == "cpu_s" else "",
    ]  # fmt: skip


def ceilings(groups: Iterable[Group]) -> str:
    """The share of the machine's best product rate that the useful arithmetic reaches."""
    rows = []
    for group in (g for g in groups if g.machine):
        kind = "float32" if group.work.precision == "float32" else "bfloat16"
        top = max(statistics.median(rates) for rates in rates_of(group, kind).values())
        for side in (OURS, group.best()):
            if side in group.runs:
                speed = flops_of(group.work, group.rows) / group.middle(side, "cpu_s") / 1e9
                rows.append([group.work.name, side, f"{speed:.0f}", f"{top:.0f}", f"{100 * speed / top:.0f} %"])
    return table(("work", "side", "useful GFLOP/s", "best product, GFLOP/s", "share"), rows)


def rates_of(group: Group, kind: str) -> dict[str, list[float]]:
    """GFLOP/s of each product in this precision, over the rounds."""
    found: dict[str, list[float]] = {}
    for line in group.machine:
        for name, rate in line["gflops"].items():
            if name.startswith(kind):
                found.setdefault(name, []).append(rate)
    return found


# ---------------------------------------------------------------------- detail
def detail(group: Group) -> str:
    """Every side of one work, the losing ones too."""
    rows, kind = [], group.work.kind
    quickest = None if group.work.slower else group.best()
    for side, runs in group.runs.items():
        line = next(iter(runs.values()))
        pace = (line.get("tokens") or group.rows * group.work.epochs) / group.middle(side, "cpu_s")
        rows.append([
            side + (" (the peer to beat)" if side == quickest else ""),
            shown(group.values(side, "cpu_s")), shown(group.values(side, "whole_cpu_s")),
            shown(group.values(side, "wall_s")) if group.work.threads is None else "",
            f"{pace:.0f}" if not group.work.slower else "", shown(group.values(side, "peak_mb"), 0),
            f"{line['steps']}", *learnt(group, side, line),
            shown(group.values(side, "accuracy"), 3) if kind != "sft" else "",
        ])  # fmt: skip
    unit = "real tokens/s" if kind == "sft" else "rows/s"
    head = ("side", "training, CPU s", "whole process, CPU s", "wall s", unit, "peak MB", "steps",
            "first loss", "last loss", "largest difference to ours", "accuracy")  # fmt: skip
    told = "\n".join(f"- `{side}`: {SIDES[side]}" for side in group.runs if side in SIDES)
    title = f"**{group.work.name}**, {group.rows} rows, {words(group.work)}"
    return f"{title}\n\n{table(head, rows)}\n\n{agreement(group)}{told}"


def words(work: Work) -> str:
    threads = "one thread" if work.threads == 1 else "each side's own threads"
    passes = "one pass" if work.epochs == 1 else f"{work.epochs} passes"
    return f"{work.method}, {work.precision}, batch {work.batch}, {passes}, rate {work.rate:g}, {threads}"


def learnt(group: Group, side: str, line: Line) -> list[str]:
    """First loss, last loss, and how far the curve is from ours where the same rows meet in every step."""
    losses = line["losses"]
    if not losses:
        return ["", "", ""]
    apart = distances(group, side)
    return [f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{max(apart):.1e}" if apart else ""]


def distances(group: Group, side: str) -> list[float]:
    """|loss - ours| by step; [] where other rows share a step."""
    ours, theirs = (next(iter(group.runs.get(s, {}).values()), {}).get("losses", []) for s in (OURS, side))
    other = side.startswith(OURS) or group.work.kind != "sft" or any(word in side for word in REORDERED)
    return [] if other else [abs(a - b) for a, b in zip(ours, theirs, strict=False)]


def agreement(group: Group) -> str:
    """Whether all who begin on the same rows begin at the same loss."""
    first = {side: found[0] for side in group.runs if (found := distances(group, side))}
    if not first or group.work.precision != "float32":
        return ""
    worst = max(first, key=lambda side: first[side])
    verdict = "agree" if first[worst] <= AGREE else "**do not agree**"
    return (
        f"Initial losses on the same rows {verdict}: at most {first[worst]:.1e} apart ({worst}; allowed {AGREE:g}).\n\n"
    )


def machines(lines: list[Line]) -> str:
    """Processor, versions, and what it gives: medians over all rounds."""
    found = [line for line in lines if "cpu" in line]
    if not found:
        return "Not measured yet."
    names = sorted({line["cpu"] for line in found})
    stacks = {side.partition("-")[0]: v for side, v in ((x["side"], x["versions"]) for x in found if "cpu_s" in x)}
    told = [f"Processor: {'; '.join(names)}.", *(stack(side, versions) for side, versions in sorted(stacks.items()))]
    copies = [line["copy_gb_s"] for line in found if "copy_gb_s" in line]
    for size in copies[0] if copies else ():
        told.append(f"Copying {size}: {shown([c[size] for c in copies])} GB/s, read and written, one thread.")
    return "\n".join(f"- {line}" for line in told)


def stack(side: str, versions: dict[str, str]) -> str:
    return f"`{side}`: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."


# ----------------------------------------------------------------------- cells
def shown(values: list[float], digits: int | None = None) -> str:
    """The median, and the range where there are several."""
    if not values:
        return ""

    def text(value: float) -> str:
        return f"{value:.{2 if digits is None and value < 100 else digits or 0}f}"

    middle = text(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} [{text(min(values))} .. {text(max(values))}]"


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown without the columns in which nothing stands; "" without rows."""
    if not rows:
        return ""
    kept: Callable[[int], bool] = lambda i: any(row[i] for row in rows)  # noqa: E731
    wanted = [i for i in range(len(head)) if kept(i)]
    lines = [[head[i] for i in wanted], ["---"] * len(wanted), *([row[i] for i in wanted] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
