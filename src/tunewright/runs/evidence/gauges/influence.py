"""Why this answer? The training rows that pushed most where a row changed sides; and those that look mislabelled.

Suggested and not proven: gradients of the tuned model's last layer alone, compared at the end of training, where they
need no backward pass (metrics/influence.py). Only a retrain without those rows could prove it. Label errors: what all
other training rows say about a row's own label. Knows Sides, no task, method or model by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunewright.contracts import Prediction, Record
from tunewright.data.batches import derive_seed
from tunewright.engine.distributed import to_device
from tunewright.metrics import influence
from tunewright.models.generation import writes
from tunewright.models.logprob import IGNORE
from tunewright.models.pooling import HeadCall, head_calls
from tunewright.runs.evidence import measures
from tunewright.runs.evidence.bases import asking, base_model
from tunewright.runs.evidence.flipped import Flip, flips
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "which training rows pushed an answer"
MOST_FLIPS = 20
MOST_ROWS = 2000  # training rows that are looked at
TOWARD, AGAINST = 3, 2  # training rows named for each flipped row
SUSPECT_SHARE, FEWEST_SUSPECTS, MOST_SUSPECTS = 0.02, 5, 40
WRITTEN_FLIPS, WRITTEN_ROWS, WRITTEN_TOKENS = 10, 100, 64  # of models that write: every token is a row of its own
WORK = {"cpu": 2e12, "cuda": 1e14}  # multiplications that products of tokens may cost: about half a minute
SHOWN = 300  # characters of a row
PROOF = "Suggested, not proven: only a retrain without these rows could prove that they made the answer."
LIMITS = (
    PROOF,
    "What is compared is the last layer at the end of training: what a row did to the layers below, or early on, is "
    "not seen.",
    "A suspected label is not a wrong one: hard and rare rows are suspected too.",
)


def measure(sides: Sides) -> dict[str, Any]:
    """Flipped rows with those that pushed them, and the list of suspects."""
    head, training = sides.loaded.layout.head, _drawn(sides)
    if head is None:
        raise NotRun("the model has no head whose input could be compared")
    if not training:
        raise NotRun("the training rows are not there")
    if all("scores" in answer for answer in sides.after) and sides.loaded.labels:
        found = _decided(sides, head, training)
    elif sides.task.packs and writes(base_model(sides)[0], head, sides.loaded.processor):
        found = _written(sides, head, training)
    else:
        raise NotRun("answers are neither labels with probabilities nor one sequence of words")
    return found | {"of": len(sides.training), "seed": sides.seed, "limits": list(LIMITS)}


def _drawn(sides: Sides) -> list[Record]:
    """Training rows, all of them where that is affordable: drawn by row id, so that they stay when others come."""
    order = sorted(sides.training, key=lambda r: derive_seed(sides.seed, "influence", r["row"]))
    most = min(MOST_ROWS, max(100, sides.affordable(1, order)))
    kept = {record["row"] for record in order[:most]}
    return [record for record in sides.training if record["row"] in kept]


# ---------------------------------------------------------------- labels with probabilities
@dataclass(frozen=True)
class Seen:
    """Rows as the tuned model's last layer sees them: features (N, D), and its answers."""

    records: Sequence[Record]
    features: Tensor
    answers: list[Prediction]

    def probabilities(self, labels: Sequence[str]) -> Tensor:
        return torch.tensor([[a["scores"][name] for name in labels] for a in self.answers], dtype=torch.float64)


def look(sides: Sides, head: str, records: Sequence[Record]) -> Seen:
    """One forward pass; rows of like length share a batch."""
    examples = [sides.task.encode(record, sides.loaded) for record in records]
    order = sorted(range(len(examples)), key=lambda i: examples[i].get("length", 0))
    rows: dict[int, tuple[Tensor, Prediction]] = {}
    with asking(sides.tuned) as device:
        for start in range(0, len(order), sides.batch_size):
            chosen = order[start : start + sides.batch_size]
            batch = to_device(sides.task.collate([examples[i] for i in chosen]), device)
            with head_calls(sides.tuned, head, len(sides.loaded.labels)) as calls:
                answers = sides.task.predict(sides.tuned, batch, sides.loaded)
            features = _features(calls, len(chosen))
            rows |= dict(zip(chosen, zip(features, answers, strict=True), strict=True))
    found = [rows[i] for i in range(len(records))]
    return Seen(records, torch.stack([features for features, _ in found]), [answer for _, answer in found])


def _features(calls: Sequence[HeadCall], count: int) -> Tensor:
    if len(calls) != 1 or len(calls[0].given) != count:
        raise NotRun("the model's head is not one linear layer that is asked once a row")
    return calls[0].decided_by().cpu()


def _decided(sides: Sides, head: str, training: Sequence[Record]) -> dict[str, Any]:
    labels = sides.loaded.labels
    place = {name: i for i, name in enumerate(labels)}
    seen = look(sides, head, training)
    truths = torch.tensor([place[str(sides.task.truth(record))] for record in training])
    found: dict[str, Any] = {"how": "last layer", "toward": "the answer that it gave", "n": len(training)}
    try:
        changed, total = flips(sides, MOST_FLIPS)
    except NotRun as reason:
        pushed: dict[str, Any] = {"flips": [], "no_flips": str(reason)}
    else:
        asked = look(sides, head, [flip.record for flip in changed])
        given = torch.tensor([place[str(answer["label"])] for answer in asked.answers])
        ways = influence.errors(asked.probabilities(labels), given)  # downhill: more of the answer that it gave
        errors = influence.errors(seen.probabilities(labels), truths)
        values = influence.pushes(seen.features, errors, asked.features, ways)
        named = [_named(sides, flip, seen, values[:, j]) for j, flip in enumerate(changed)]
        pushed = {"flips": named, "flipped": total}
    suspects = _suspects(sides, seen, influence.left_out(seen.features, truths, len(labels)))
    return found | pushed | {"suspects": suspects, "sentence": _sentence(pushed, suspects, len(training))}


def _named(sides: Sides, flip: Flip, seen: Seen, values: Tensor) -> dict[str, Any]:
    """A flipped row with the rows that pushed most, either way."""
    order = torch.argsort(values, stable=True, descending=True).tolist()
    chosen = [i for i in order[:TOWARD] if values[i] > 0] + [i for i in order[: -AGAINST - 1 : -1] if values[i] < 0]
    rows = [
        _row(sides, seen.records[i], seen.answers[i] if seen.answers else None)
        | {"way": "toward" if values[i] > 0 else "against", "push": float(values[i])}
        for i in chosen
    ]
    return flip.shown(sides) | {"pushed_by": rows}


def _row(sides: Sides, record: Record, answer: Prediction | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"row": record["row"], **measures.shown_input(sides.task, record)}
    facts["input"] = facts["input"][:SHOWN]
    truth = sides.task.truth(record)
    facts |= {"label": truth[:SHOWN]} if truth is not None else {}
    return facts | ({"answer": answer["label"], "score": answer["score"]} if answer and "label" in answer else {})


def _suspects(sides: Sides, seen: Seen, agreed: Tensor) -> dict[str, Any]:
    """Training rows whose label the other rows deny most; how many of them the tuned model itself answers otherwise."""
    order = torch.argsort(agreed, stable=True).tolist()
    listed = max(min(FEWEST_SUSPECTS, len(order)), round(SUSPECT_SHARE * len(order)))
    wrong = [i for i in order[:listed] if seen.answers[i]["label"] != sides.task.truth(seen.records[i])]
    rows = [
        _row(sides, seen.records[i], seen.answers[i]) | {"agreed": float(agreed[i])}
        for i in order[: min(listed, MOST_SUSPECTS)]
    ]
    return {"n": len(order), "listed": listed, "answered_otherwise": len(wrong), "rows": rows}


def _sentence(pushed: dict[str, Any], suspects: dict[str, Any], n: int) -> str:
    rows = len(pushed["flips"])
    first = (
        f"For {rows} of {pushed['flipped']} rows that changed sides, the training rows (of {n}) that pushed most."
        if rows
        else f"{pushed['no_flips'].capitalize()}."
    )
    wrong, listed = suspects["answered_otherwise"], suspects["listed"]
    advice = ": read these first" if wrong else ""
    return (
        f"{first} Of the {listed} training rows whose labels are most suspect the tuned model itself answers {wrong} "
        f"otherwise{advice}."
    )


# ------------------------------------------------------------------------- models that write
Tokens = tuple[tuple[Tensor, Tensor], bool]  # features and errors of a text, and whether the head has a bias


def _written(sides: Sides, head: str, training: Sequence[Record]) -> dict[str, Any]:
    """The same for language models, token by token; `toward` is the right text, which has no label."""
    changed, total = flips(sides, WRITTEN_FLIPS)
    kept = [(flip, tokens) for flip in changed if (tokens := _tokens(sides, head, flip.record)) is not None]
    if not kept:
        raise NotRun("no row that changed has a token that is learnt")
    device = next(sides.tuned.parameters()).device.type
    (features, errors), _ = kept[0][1]
    cost = WRITTEN_TOKENS * sum(len(t[0][0]) for _, t in kept) * (features.shape[1] + errors.shape[1])
    rows = list(training[: min(WRITTEN_ROWS, max(1, int(WORK.get(device, WORK["cpu"]) / cost)))])
    learnt = [(record, tokens) for record in rows if (tokens := _tokens(sides, head, record)) is not None]
    if not learnt:
        raise NotRun("no training row has a token that is learnt")
    seen = Seen([record for record, _ in learnt], torch.empty(0), [])
    sizes = [_size(tokens) for _, tokens in learnt]
    named = []
    for flip, asked in kept:
        size = _size(asked)
        raw = [influence.token_products(tokens[0], asked[0], bias=asked[1]) for _, tokens in learnt]
        values = [value / (size * own) if size * own else 0.0 for value, own in zip(raw, sizes, strict=True)]
        named.append(_named(sides, flip, seen, torch.tensor(values, dtype=torch.float64)))
    return {
        "how": "last layer, token by token", "toward": "the right text", "n": len(learnt), "flips": named,
        "flipped": total, "tokens": WRITTEN_TOKENS,
        "suspects": {"not_run": "these rows have texts for answers and no labels"},
        "sentence": f"For {len(named)} of {total} rows whose score moved, the training rows (of {len(learnt)} looked "
                    f"at, by their first {WRITTEN_TOKENS} learnt tokens) that pushed most.",
    }  # fmt: skip


def _size(tokens: Tokens) -> float:
    """The length of a text's own gradient."""
    return max(0.0, influence.token_products(tokens[0], tokens[0], bias=tokens[1])) ** 0.5


def _tokens(sides: Sides, head: str, record: Record) -> Tokens | None:
    """Features (T, D) and errors (T, V) at the first learnt tokens of a row, and whether the head has a bias."""
    example = sides.task.encode(record, sides.loaded)
    ids, labels = example["input_ids"].unsqueeze(0), example["labels"]
    places = (labels[1:] != IGNORE).nonzero()[:WRITTEN_TOKENS, 0]
    if not len(places):
        return None
    ids = ids[:, : int(places[-1]) + 2]  # what comes later is not seen from here, and may not fit the model
    words = sides.tuned.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    with asking(sides.tuned) as device, head_calls(sides.tuned, head, words) as calls:
        sides.tuned(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device), use_cache=False)
    if len(calls) != 1:
        raise NotRun("the model's head is not one linear layer that is asked once a row")
    given, logits = calls[0].given[0, -ids.shape[1] :].cpu(), calls[0].gave[0, -ids.shape[1] :].cpu()
    wanted = labels[1:][places]
    error = torch.softmax(logits[places].float(), -1)
    error[torch.arange(len(places)), wanted] -= 1
    return (given[places], error), calls[0].bias
