"""How several models become one: the options, the arithmetic behind each, and what is chosen by its score.

A new head has no value in the base, so it has no change: in every way of merging it is the weighted mean of the models'
heads, never trimmed, dropped or scaled; statistics of normalisation layers likewise. Knows weights, not runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tunewright.data.batches import derive_seed
from tunewright.errors import Fault
from tunewright.models import arithmetic

Say = Callable[[str], None]
Weights = dict[str, Tensor]
BASE_SHARES = tuple(i / 10 for i in range(10))  # tried by `--base-share auto`
DENSITY = {"ties": 0.2, "dare": 0.1}  # Yadav 2023 trims to 20 %; Yu 2023 drops 90 %
SCALE = {"add": 0.4, "ties": 1.0, "dare": 1.0}  # sums of changes overshoot: .3 to .5 (Ilharco 2022)


@dataclass(frozen=True)
class Way:
    """How several runs become one model. None: the default of `how`, or not asked for."""

    how: Literal["linear", "add", "ties", "dare", "soup"] | None = None
    weights: tuple[float, ...] | None = None  # one a run; linear, dare: made to add up to 1
    density: float | None = None  # ties, dare: share of the changes that stays
    scale: float | None = None  # add, ties, dare: factor on the merged change
    seed: int = 0  # dare: which changes stay
    base_share: float | Literal["auto"] | None = None  # of the base's weights in the result (WiSE-FT)

    def faults(self, runs: int) -> list[Fault]:
        """What does not fit together, by the command line's words."""
        name, found = self.how or "linear", []
        if self.weights is not None and (name == "soup" or len(self.weights) != runs):
            expected = "none: a soup is a plain mean" if name == "soup" else f"{runs}, one a run"
            found.append(Fault("weights do not fit", "--weights", expected=expected, got=str(len(self.weights))))
        elif self.weights is not None and name != "add" and (min(self.weights) < 0 or not sum(self.weights) > 0):
            found.append(Fault("impossible weights", "--weights", expected="0 or more each, not all 0"))
        for option, value, takers in (("density", self.density, DENSITY), ("scale", self.scale, SCALE)):
            if value is not None and name not in takers:
                remedy = f"It belongs to --how {' or '.join(takers)}."
                found.append(Fault(f"--how {name} takes none", f"--{option}", remedy=remedy))
        if self.density is not None and not 0 < self.density <= 1:
            found.append(Fault("impossible", "--density", expected="more than 0, at most 1", got=str(self.density)))
        if isinstance(self.base_share, float) and not 0 <= self.base_share <= 1:
            found.append(Fault("impossible", "--base-share", expected="from 0 to 1", got=str(self.base_share)))
        return found

    def told(self, names: Sequence[str], base_share: float) -> str:
        """What was done, in one sentence."""
        kinds = {
            "linear": "weighted mean",
            "soup": "mean, a greedy soup,",
            "add": "base plus the sum of the changes",
            "ties": "TIES (changes trimmed, signs elected)",
            "dare": "DARE (changes dropped at random, the rest enlarged)",
        }
        kind = f"{kinds[self.how or 'linear']} of " if len(names) > 1 or self.how else ""
        base = f", with {base_share:g} of the base" if base_share else ""
        return f"In float32, on whole weights: {kind}{', '.join(names)}{base}."

    def settled(self, base_share: float) -> dict[str, Any]:
        """Every number that the result depends on."""
        name = self.how or "linear"
        found = {
            "weights": self.weights,
            "density": DENSITY.get(name) if self.density is None else self.density,
            "scale": SCALE.get(name) if self.scale is None else self.scale,
            "seed": self.seed if name == "dare" else None,
            "base_share": base_share,
        }
        return {"way": name} | {key: value for key, value in found.items() if value is not None}

    @property
    def chooses(self) -> bool:
        """Whether something is chosen by its score, on validation rows."""
        return self.how == "soup" or self.base_share == "auto"


@dataclass
class Mixture:
    """Models of one base, as weights."""

    base: Weights  # without what is new in the models: a head, the rows of new tokens
    models: list[Weights]
    buffers: set[str]  # statistics: averaged, never trimmed, dropped or scaled
    digests: list[str]  # one a model: what DARE draws by

    def mix(self, way: Way, chosen: Sequence[int] | None = None, base_share: float = 0.0) -> Weights:
        """One model of all of them, or of the chosen ones, with a share of the base."""
        picked = range(len(self.models)) if chosen is None else chosen
        given = [1.0 if way.weights is None else way.weights[i] for i in picked]
        total = sum(given)
        shares = [1 / len(given)] * len(given) if way.how == "add" else [w / total for w in given]
        runs = [self.models[i] for i in picked]
        averaged = arithmetic.mean([_part(r, (set(r) - set(self.base)) | self.buffers) for r in runs], shares)
        moved = self._moved(way, [_part(r, set(self.base) - self.buffers) for r in runs], given, shares, picked)
        tuned = averaged | moved
        if base_share:
            between = arithmetic.mean([self.base, _part(tuned, set(self.base))], [base_share, 1 - base_share])
            tuned |= between
        return tuned

    def _moved(
        self, way: Way, runs: Sequence[Weights], given: Sequence[float], shares: Sequence[float], picked: Sequence[int]
    ) -> Weights:
        """The weights that have a value in the base."""
        if way.how in (None, "linear", "soup"):
            return arithmetic.mean(runs, shares)
        base = _part(self.base, set(runs[0]))
        deltas = [arithmetic.changes(base, run) for run in runs]
        scale = SCALE[way.how] if way.scale is None else way.scale
        if way.how == "add":
            return arithmetic.add(base, deltas, [scale * w for w in given])
        density = DENSITY[way.how] if way.density is None else way.density
        if way.how == "ties":
            return arithmetic.ties(base, deltas, given, density, scale)
        seeds = [derive_seed(way.seed, "dare", self.digests[i]) for i in picked]  # of the run, not of its place
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        return arithmetic.dare(base, deltas, shares, density, scale, draws)


def _part(weights: Weights, names: set[str]) -> Weights:
    return {name: value for name, value in weights.items() if name in names}


# ------------------------------------------------------------------------- choosing
Score = Callable[[Weights], float]  # on validation rows; more is better


def greedy_soup(mixture: Mixture, way: Way, score: Score) -> tuple[list[int], list[dict[str, Any]]]:
    """Models from best to worst, each kept in the mean if the score does not drop; and every step.

    The soup therefore scores at least as high as the best model alone. Wortsman 2022.
    """
    single = [score(mixture.mix(way, [i])) for i in range(len(mixture.models))]
    order = sorted(range(len(single)), key=lambda i: -single[i])
    chosen, best = [order[0]], single[order[0]]
    steps: list[dict[str, Any]] = [{"model": order[0], "alone": best, "with_it": best, "kept": True}]
    for i in order[1:]:
        together = score(mixture.mix(way, [*chosen, i]))
        kept = together >= best
        steps.append({"model": i, "alone": single[i], "with_it": together, "kept": kept})
        chosen, best = ([*chosen, i], together) if kept else (chosen, best)
    return chosen, steps


def best_base_share(
    mixture: Mixture, way: Way, chosen: Sequence[int], score: Score
) -> tuple[float, dict[float, float]]:
    """The share of the base with the best score, of equals the smallest; and the score of each."""
    scores = {share: score(mixture.mix(way, chosen, share)) for share in BASE_SHARES}
    return max(BASE_SHARES, key=lambda share: scores[share]), scores
