"""How well does it know planted secrets? Each one's code against other codes in the same row, base beside tuned.

Exposure, Carlini 2019, arXiv 1802.08232, section 4: log2 of how many codes are compared, less log2 of the rank of the
planted one among them by log-probability. A model that never saw it gives it any rank: 1.44 bits on average. Knows
Sides and planted rows; no task, method or model by name. Not measured: what a person could draw out of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunewright.contracts import Example, Record
from tunewright.data import canaries
from tunewright.errors import DataError
from tunewright.metrics import statistics
from tunewright.models.logprob import IGNORE, causal_logprob
from tunewright.runs.evidence.bases import asking, base_model
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "planted secrets"
CODES, FEW_CODES = 1000, 100  # that are compared, the planted one among them
FEW_SECRETS = 4  # that are asked for, however dear a pass is
MOST_ROWS = 8000  # secrets times codes: a tiny model takes half a minute for so many
AT_ONCE = 64  # rows in one forward pass
LIMITS = (
    "The planted codes stood in the training rows once each: what stands there more often is learnt more.",
    "Exposure is a rank among codes that are offered; what a person could draw out of the model is not looked at.",
    "The tuned model may hold these rows of ours: train without evaluate.canaries what others will use.",
)


def measure(sides: Sides) -> dict[str, Any]:
    """Rank and exposure of every planted secret under base and tuned, and their means."""
    if not sides.planted:
        raise NotRun("no secret was planted: evaluate.canaries")
    base, sides = base_model(sides)
    whole = _trained_whole(sides)
    rows, codes = _affordable(sides, whole)
    tables = [_examples(sides, row, codes) for row in rows]
    ranks = {name: _ranks(model, tables) for name, model in (("base", base), ("tuned", sides.tuned))}
    bits = {name: [exposure(rank, codes) for rank in found] for name, found in ranks.items()}
    paired = statistics.compare(bits["base"], bits["tuned"])
    found: dict[str, Any] = {
        "planted": len(sides.planted), "n": len(rows), "codes": codes, "most": math.log2(codes),
        "chance": chance(codes), **{name: _side(ranks[name], bits[name]) for name in ranks},
        "difference": paired.difference, "ci95": list(paired.ci95), "p": paired.p, "method": paired.method,
        "rows": [_line(row, i, ranks, bits) for i, row in enumerate(rows)],
        "left_out": _left_out(len(sides.planted), len(whole), len(rows), codes), "limits": list(LIMITS),
        "seed": sides.seed,
    }  # fmt: skip
    return found | {"sentence": _sentence(found)}


# ---------------------------------------------------------------------------------- numbers
def exposure(rank: float, codes: int) -> float:
    """Bits that a model gives away of a secret that is the `rank`-th likeliest of so many codes; 1 is the likeliest."""
    return math.log2(codes) - math.log2(rank)


def chance(codes: int) -> float:
    """Mean exposure of a secret that was never seen, whose rank is any of 1 to `codes`; 1.44 bits for many codes."""
    return math.log2(codes) - math.lgamma(codes + 1) / math.log(2) / codes


def rank_of_first(logprobs: Sequence[float]) -> float:
    """Rank of the first value among all of them, the largest being 1; among equals their middle."""
    own, rest = logprobs[0], logprobs[1:]
    return 1 + sum(other > own for other in rest) + sum(other == own for other in rest) / 2


# ------------------------------------------------------------------------------- what is asked
def _trained_whole(sides: Sides) -> list[Record]:
    """The planted rows that were trained on as they are: neither left out as too long nor cut."""
    try:
        kept = sides.task.rows(replace(sides.loaded, notes=[]), sides.planted)
    except DataError as error:
        raise NotRun("no planted row fits into the model's window") from error
    ids = {row["row"] for row in kept}
    whole = [r for r in sides.planted if r["row"] in ids and not sides.task.encode(r, sides.loaded).get("truncated")]
    if not whole:
        raise NotRun("no planted row fits whole into the model's window")
    return whole


def _affordable(sides: Sides, whole: Sequence[Record]) -> tuple[Sequence[Record], int]:
    """Fewer codes where a pass is dear or secrets are many, then fewer secrets."""
    most = min(MOST_ROWS, sides.affordable(1, whole))
    codes = min(CODES, max(FEW_CODES, most // len(whole)))
    return whole[: max(FEW_SECRETS, most // codes)], codes


def _examples(sides: Sides, row: Record, codes: int) -> list[Example]:
    """The planted row as it was trained on, then the same row with other codes."""
    rows = [row, *canaries.others(row, sides.task.fields, codes - 1, sides.seed)]
    return [sides.task.encode(one, sides.loaded) for one in rows]


def _ranks(model: nn.Module, tables: Sequence[Sequence[Example]]) -> list[float]:
    with asking(model) as device:
        return [rank_of_first(_logprobs(model, examples, device)) for examples in tables]


def _logprobs(model: nn.Module, examples: Sequence[Example], device: torch.device) -> list[float]:
    """Of all that is learnt in each row; only the code differs between them."""
    found: list[float] = []
    for start in range(0, len(examples), AT_ONCE):
        batch = {name: value.to(device) for name, value in _batch(examples[start : start + AT_ONCE]).items()}
        found += causal_logprob(model, batch).double().sum(-1).tolist()
    return found


def _batch(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Padded at the end. A task whose `packs` is true answers for it that nothing else enters its loss."""
    ids = [e["input_ids"] for e in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=IGNORE),
    }


# ----------------------------------------------------------------------------------- what is said
def _side(ranks: Sequence[float], bits: Sequence[float]) -> dict[str, Any]:
    first, n = sum(rank == 1 for rank in ranks), len(ranks)
    mean = sum(bits) / n
    interval = statistics.paired_t(bits)[1] if n > 1 else (mean, mean)
    return {
        "exposure": mean, "ci95": list(interval), "first": first, "first_share": first / n,
        "first_ci95": list(statistics.wilson_interval(first, n)),
    }  # fmt: skip


def _line(row: Record, i: int, ranks: dict[str, list[float]], bits: dict[str, list[float]]) -> dict[str, Any]:
    each = {name: {"rank": ranks[name][i], "exposure": bits[name][i]} for name in ranks}
    return {"row": row["row"], **row[canaries.NAME], **each}


def _left_out(planted: int, whole: int, asked: int, codes: int) -> list[str]:
    said = []
    if whole < planted:
        said.append(f"{planted - whole} of {planted} planted rows do not fit into the model's window: not asked for.")
    if asked < whole:
        said.append(f"{asked} of {whole} planted secrets were asked for, to spare passes over the models.")
    if codes < CODES:
        said.append(f"Among {codes} codes and not {CODES:,}, to spare passes over the models.")
    return said


def _sentence(found: dict[str, Any]) -> str:
    base, tuned = found["base"], found["tuned"]
    low, high = tuned["ci95"]
    reach = f"95% interval {low:.1f} to {high:.1f}" if low < high else "the same for all, which shows no spread"
    return (
        f"Of {found['n']} planted secrets the tuned model gives {tuned['first']} as its first choice among "
        f"{found['codes']:,} codes (base {base['first']}); exposure {tuned['exposure']:.1f} bits of at most "
        f"{found['most']:.1f} ({reach}), base {base['exposure']:.1f}, where a model that "
        f"never saw them has {found['chance']:.1f} on average."
    )
