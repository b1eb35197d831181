"""What changed inside, and what of it does the result need? Weights are put back, part by part, and scored again.

REVERT: the tuned model with one part of the base: what is lost, the result needs. GRAFT: the base with one part of the
tuned model: what that part does alone. STRENGTH: base + s (tuned - base), with a recommended s below 1 only where kept
skills clearly improve and the task stays within the margin. How far weights moved stands beside it and explains
nothing: a part can move far and do nothing. Grafting: Panigrahi 2023, arXiv 2302.06600; interpolation: Wortsman 2021,
arXiv 2109.01903. Knows Sides and Layout; no task, method or model by name.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tunewright.contracts import Example, Metric, Record
from tunewright.data.batches import derive_seed
from tunewright.engine.distributed import to_device
from tunewright.engine.evaluate import predict_rows, score_rows
from tunewright.errors import MethodError
from tunewright.metrics import statistics
from tunewright.models import arithmetic, weights
from tunewright.models.generation import writes
from tunewright.models.weights import Part, Weights
from tunewright.runs.evidence import neutral
from tunewright.runs.evidence.bases import asking, plain_base
from tunewright.runs.evidence.choosing import chosen_ends
from tunewright.runs.evidence.sides import NotRun, Sides
from tunewright.runs.evidence.verdict import FEWEST_ROWS

PASSES = True
ABOUT = "what changed inside"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MOST_PARTS, FEW_PARTS = 12, 4  # groups of neighbouring blocks
MOST_ROWS, LEAST_ROWS = 300, 40
# Multiplications and additions to spend on rows, counted and not timed, so that the same run looks at the same rows:
# about half a minute on two CPU cores.
WORK = {"cpu": 8e12, "cuda": 1e15}
TOO_MUCH = 40  # times that: not started
WRITING = (
    200  # what a number that a layer writes costs, in multiplications: MobileNetV2 takes 27 ms a picture on one core
)
ALPHA = 0.05
RESAMPLES = 400  # of a metric that pools its rows
LIMITS = (
    "Parts work together: their effects need not add up to the whole.",
    "A part that was put back sees inputs that it never saw before.",
    "Needed is not stored: that the result needs a part does not say that the new skill sits there.",
    "How far a part's weights moved does not say what they do.",
)


def measure(sides: Sides) -> dict[str, Any]:
    """Every part with how far it moved and what the result needs of it; the sweep; a recommended strength."""
    if sides.plain is None:
        raise NotRun("the change of this method cannot be folded into plain weights")
    if len(sides.test) < FEWEST_ROWS:
        raise NotRun(f"{len(sides.test)} test rows are fewer than {FEWEST_ROWS}")
    bench = _bench(sides)
    sides = bench.sides
    moved = {part.name: weights.moved(bench.base, bench.tuned, part.names) for part in bench.parts}
    effects = _effects(bench)
    parts = [
        {"name": p.name, "kind": p.kind, "places": list(p.places), "moved": moved[p.name], **effects.get(p.name, {})}
        for p in bench.parts
    ]
    sweep = _sweep(bench)
    carried = list(sides.loaded.fresh)
    return {
        "metric": {"name": bench.metric.name, "higher_is_better": bench.metric.higher_is_better,
                   "proportion": bench.metric.proportion},
        "rows": {"n": len(bench.rows), "of": len(sides.test), "seed": sides.seed},
        "carried": carried,
        "whole": _whole(bench),
        "parts": parts,
        "sweep": sweep,
        "recommended": _recommended(bench, sweep),
        "sentence": _sentence(parts, bench.metric),
        "limits": [*LIMITS, *(f"The base has no {name}: it has the tuned one here." for name in carried)],
    }  # fmt: skip


# -------------------------------------------------------------------------- the bench
@dataclass
class Bench:
    """A model to put weights into, and the rows on which it is scored.

    base, tuned: by name, what both sides have; one tensor in both where nothing changed. What the tuned model alone has
                 stays in `model`.
    sign:        turns the first metric so that more is better.
    """

    sides: Sides
    model: nn.Module
    base: dict[str, Any]
    tuned: dict[str, Any]
    parts: list[Part]
    rows: list[Record]
    examples: list[Example]
    sign: float
    standing: dict[str, Any] = field(default_factory=dict)  # what the model holds now

    @property
    def metric(self) -> Metric:
        return self.sides.task.metrics[0]

    @property
    def changed(self) -> list[Part]:
        return [part for part in self.parts if any(self.base[n] is not self.tuned[n] for n in part.names)]

    @functools.cached_property
    def full(self) -> list[Any]:
        """The tuned model's score of every row."""
        return self.score(self.tuned)

    @functools.cached_property
    def none(self) -> list[Any]:
        """The base's, with what it does not have from the tuned model."""
        return self.score(self.base)

    def mixed(self, part: Part, of: Weights, into: Weights) -> dict[str, Any]:
        return {**into, **{name: of[name] for name in part.names}}

    def put(self, given: Weights) -> nn.Module:
        """The model with these weights; only those are copied that do not stand there yet."""
        other = {name: value for name, value in given.items() if self.standing.get(name) is not value}
        self.standing |= other
        return weights.put(self.model, other)

    def score(self, given: Weights) -> list[Any]:
        """The first metric of every row under these weights."""
        task, loaded = self.sides.task, self.sides.loaded
        model, size = self.put(given), self.sides.batch_size
        found = predict_rows(task, model, loaded, self.examples, batch_size=size, validating=True)
        return [scores[self.metric.name] for scores in score_rows(task, found, self.rows)]

    def effect(self, without: Sequence[Any], with_it: Sequence[Any]) -> dict[str, Any]:
        """What is gained from one to the other, so turned that more is better; paired, by row."""
        column, seed = self.sides.group, self.sides.seed
        groups = [str(r["extra"].get(column)) for r in self.rows] if column else None
        if self.metric.pool:
            paired = statistics.paired_pool(without, with_it, self.metric.pool, RESAMPLES, seed, groups)
        else:
            paired = statistics.compare(without, with_it, groups=groups, seed=seed)
        return _turned(paired, self.sign)


def _turned(paired: statistics.Paired, sign: float) -> dict[str, Any]:
    return {
        "n": paired.n,
        "difference": sign * paired.difference,
        "ci95": sorted(sign * end for end in paired.ci95),
        "p": paired.p,
        "method": paired.method,
    }


def _bench(sides: Sides) -> Bench:
    assert sides.plain is not None
    try:
        plain = sides.plain()
    except MethodError as error:
        raise NotRun(f"the change cannot be folded: {str(error).splitlines()[0].rstrip('.')}") from error
    model = (copy.deepcopy(plain) if plain is sides.tuned else plain).eval()
    start, sides = plain_base(sides)
    tuned, base = weights.weights(model), weights.weights(start)
    names = weights.in_common(base, tuned, sides.loaded.fresh)
    if not names:
        raise NotRun("the tuned weights do not bear the base's names")
    # what did not change is kept once
    base = {n: tuned[n] if base[n].equal(tuned[n]) else base[n] for n in names}
    tuned = {n: tuned[n] for n in names}
    sign = 1.0 if sides.task.metrics[0].higher_is_better else -1.0
    bench = Bench(sides, model, base, tuned, [], [], [], sign)
    _choose(bench)
    return bench


def _choose(bench: Bench) -> None:
    """Parts and rows within the work that this device should spend: fewer rows first, then fewer parts."""
    sides, layout = bench.sides, bench.sides.loaded.layout
    order = random.Random(derive_seed(sides.seed, "rows")).sample(range(len(sides.test)), len(sides.test))  # noqa: S311
    device = _device(bench.model)
    each, work = _work_of_a_row(bench, [sides.test[i] for i in order[:8]]), WORK[device if device in WORK else "cuda"]
    for most in (MOST_PARTS, FEW_PARTS):
        bench.parts = weights.parts_of(bench.base, layout, most)
        passes = 2 * len(bench.changed) + len(STRENGTHS)
        affordable = work / (passes * max(each, 1.0))
        if affordable >= LEAST_ROWS:
            break
    if affordable * TOO_MUCH < LEAST_ROWS:
        raise NotRun(f"{passes} passes over {LEAST_ROWS} rows take too long on this {device}")
    if not bench.changed:
        raise NotRun("no weight of the base changed")
    chosen = sorted(order[: max(LEAST_ROWS, min(MOST_ROWS, int(affordable)))])
    bench.rows = [sides.test[i] for i in chosen]
    bench.examples = [sides.task.encode(r, sides.loaded) for r in bench.rows]


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _work_of_a_row(bench: Bench, records: Sequence[Record]) -> float:
    """Work of one pass, by row, counted on a few: multiplications and additions of matrix products and convolutions,
    and the numbers that layers write, which is what small convolutions spend their time on."""
    sides, written = bench.sides, [0]

    def count(layer: nn.Module, given: Any, result: Any) -> None:
        written[0] += result.numel() if isinstance(result, Tensor) else 0

    batch = sides.task.collate([sides.task.encode(r, sides.loaded) for r in records])
    hooks = [layer.register_forward_hook(count) for layer in bench.model.modules() if not [*layer.children()]]
    try:
        with asking(bench.model) as device, FlopCounterMode(display=False) as counter:
            sides.task.validate(bench.model, to_device(batch, device), sides.loaded)
    finally:
        for hook in hooks:
            hook.remove()
    return (counter.get_total_flops() + WRITING * written[0]) / len(records)


# --------------------------------------------------------------------- revert and graft
def _whole(bench: Bench) -> dict[str, Any]:
    """All parts at once: what the two ways, part by part, are to be held against; and how exactly the ends fit."""
    sides, metric = bench.sides, bench.metric
    found = {"base": metric.overall(bench.none), "tuned": metric.overall(bench.full)}
    places = {record["row"]: i for i, record in enumerate(sides.test)}
    sources = {"tuned": (sides.after, bench.full), "base": (sides.before, bench.none)}
    if sides.base is None or sides.loaded.fresh:
        del sources["base"]  # what answered for the base was another model, or a rule
    gaps = {}
    for name, (answers, ours) in sources.items():
        known = score_rows(sides.task, [answers[places[r["row"]]] for r in bench.rows], bench.rows)
        if all(isinstance(one, int | float) for one in ours):
            gaps[name] = max(abs(k[metric.name] - o) for k, o in zip(known, ours, strict=True))
    return found | bench.effect(bench.none, bench.full) | {"largest_gap": gaps}


def _effects(bench: Bench) -> dict[str, dict[str, Any]]:
    """By part: `needs` (revert) and `alone` (graft), each family of intervals with its own Holm correction."""
    found: dict[str, dict[str, Any]] = {part.name: {} for part in bench.changed}
    for part in bench.changed:
        reverted = bench.score(bench.mixed(part, bench.base, bench.tuned))
        grafted = bench.score(bench.mixed(part, bench.tuned, bench.base))
        found[part.name] = {"needs": bench.effect(reverted, bench.full), "alone": bench.effect(bench.none, grafted)}
    for way in ("needs", "alone"):
        corrected = statistics.holm([entry[way]["p"] for entry in found.values()])
        for entry, p in zip(found.values(), corrected, strict=True):
            entry[way] |= {"p_holm": p, "finding": _finding(entry[way], p)}
    return found


def _finding(effect: dict[str, Any], p: float) -> str:
    low, high = effect["ci95"]
    if p > ALPHA or low <= 0 <= high:
        return "unclear"
    return "helps" if low > 0 else "harms"


def _sentence(parts: Sequence[dict[str, Any]], metric: Metric) -> str:
    clear = [p for p in parts if p.get("needs", {}).get("finding") == "helps"]
    if not clear:
        return "No part alone is clearly needed: putting any one of them back changes nothing that these rows can show."
    most = max(clear, key=lambda p: p["needs"]["difference"])
    far = max(parts, key=lambda p: p["moved"]["relative_norm"])
    values = (most["needs"]["difference"], *most["needs"]["ci95"])
    lost, low, high = (f"{100 * v:.1f}" if metric.proportion else f"{v:.3g}" for v in values)
    unit = " points of" if metric.proportion else " of"
    other = "" if far is most else f" The weights that moved furthest are in another part: {far['name']}."
    return (
        f"The result needs {most['name']} most: with the base's weights there it loses {lost}{unit} {metric.name} "
        f"(95% interval {low} to {high}).{other}"
    )


# ------------------------------------------------------------------------- strength
def at_strength(base: Weights, tuned: Weights, strength: float) -> dict[str, Any]:
    """base + strength (tuned - base), exactly the one at 0 and the other at 1, as `merge --base-share` writes it."""
    return arithmetic.mean([base, tuned], [1 - strength, strength])


def _sweep(bench: Bench) -> list[dict[str, Any]]:
    """The task, and kept skills where there are any, at every strength; each against full strength, by row."""
    kept, known = _kept(bench), {0.0: bench.none, 1.0: bench.full}
    scores: dict[float, list[Any]] = {}
    rows: dict[float, list[float]] = {}
    for strength in STRENGTHS:
        given = at_strength(bench.base, bench.tuned, strength)
        scores[strength] = known[strength] if strength in known else bench.score(given)
        if kept:
            rows[strength] = kept.rows(bench.put(given))
    found: list[dict[str, Any]] = []
    for strength in STRENGTHS:
        if bench.metric.pool is None and not all(map(math.isfinite, scores[strength])):
            continue  # beyond full strength a model may fall apart
        value = bench.metric.overall(scores[strength])
        against = bench.effect(scores[1.0], scores[strength])
        found.append({"strength": strength, "value": value, "against_full": against})
        if kept:
            paired = statistics.compare(rows[1.0], rows[strength], seed=bench.sides.seed)
            facts = {"name": kept.name, "proportion": kept.proportion, "value": paired.tuned}
            found[-1]["kept"] = facts | _turned(paired, kept.sign)
    return found


@dataclass(frozen=True)
class Kept:
    """Skills that should stay: a number a row, and which way is better."""

    name: str
    rows: Any  # (model) -> list[float]
    sign: float
    proportion: bool  # right or wrong, said in points


def _kept(bench: Bench) -> Kept | None:
    """Rows of other skills where the user gave some, else the packaged questions for a language model, else nothing."""
    sides = bench.sides
    rows = [record for records in sides.general.values() for record in records]
    if rows and bench.metric.pool is None:
        examples = [sides.task.encode(r, sides.loaded) for r in rows]

        def scored(model: nn.Module) -> list[float]:
            size = sides.batch_size
            found = predict_rows(sides.task, model, sides.loaded, examples, batch_size=size, validating=True)
            return [scores[bench.metric.name] for scores in score_rows(sides.task, found, rows)]

        return Kept(", ".join(sides.general), scored, bench.sign, bench.metric.proportion)
    if not writes(bench.model, sides.loaded.layout.head, sides.loaded.processor):
        return None
    items = neutral.items()

    def right(model: nn.Module) -> list[float]:
        ends = chosen_ends(model, sides.loaded.processor, items)
        return [float(end == item["right"]) for end, item in zip(ends, items, strict=True)]

    return Kept("general questions", right, 1.0, True)


def _recommended(bench: Bench, sweep: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A strength below 1 only if kept skills clearly improve there and the task surely stays within the margin."""
    if "kept" not in sweep[0]:
        return {"strength": 1.0, "why": "no kept skills were measured, so nothing speaks for less than full strength"}
    below = [entry for entry in sweep if 0 < entry["strength"] < 1]
    corrected = statistics.holm([entry["kept"]["p"] for entry in below])
    fit = [
        entry
        for entry, p in zip(below, corrected, strict=True)
        if _finding(entry["kept"], p) == "helps" and entry["against_full"]["ci95"][0] >= -bench.sides.margin
    ]
    if not fit:
        return {
            "strength": 1.0,
            "why": "at no lower strength do kept skills clearly improve with the task in its margin",
        }
    best = max(fit, key=lambda entry: (entry["kept"]["difference"], entry["strength"]))
    strength = best["strength"]
    return {
        "strength": strength,
        "why": f"{best['kept']['name']} clearly improve, and the task stays within the margin",
        "command": f"tunewright merge {bench.sides.name} --base-share {1 - strength:g}",
    }
