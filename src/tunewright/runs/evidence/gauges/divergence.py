"""How far did it move on inputs that were not its task? Base, adapters off, against tuned; never "forgot".

Language models: KL(base || tuned) a token, on texts drawn from the base itself with an empty prompt, on neutral texts,
and on the task's own test rows. Others: 1 - linear CKA and the neighbours that changed, on neutral texts or drawn
pictures; classifiers that had this head before: KL of their answers; the base's own head where it has another.
Shenfeld 2025, arXiv 2509.04259 (KL and forgetting); arXiv 2505.13811 (texts from an empty prompt). Knows Sides, no
task, method or model by name.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Prediction, Record
from tunewright.data.batches import derive_seed
from tunewright.engine.distributed import to_device
from tunewright.metrics import similarity, statistics
from tunewright.models import weights
from tunewright.models.generation import sample_ids, writes
from tunewright.models.logprob import IGNORE, kl_divergence
from tunewright.models.pooling import last_states
from tunewright.runs.evidence import neutral
from tunewright.runs.evidence.bases import asking, base_model, opened
from tunewright.runs.evidence.sides import NotRun, Sides

PASSES = True
ABOUT = "how far it moved on other inputs"
SAMPLES = 200  # drawn from the base
SAMPLED_TOKENS = 32
DRAWN_AT_ONCE = 100
LONGEST = 64  # tokens of a neutral text; ours are all shorter
TASK_ROWS = 200
TASK_TOKENS = 512  # of a test row: beyond it, what is scored is cut at its beginning
TOKENS_AT_ONCE = 2048  # in a forward pass
LOGITS_AT_ONCE = 512  # positions whose whole vocabulary is compared at a time
TINY = 1e-12  # a probability that float32 rounded to 0
TIES = -1e-4  # nats a token: a KL below that is no rounding but a fault of ours
LIMITS = (
    "These numbers say how far it moved, not what was lost: another format or language moves it far and harms nothing.",
    "No number here is a threshold: how much is much differs from model to model.",
)


def measure(sides: Sides) -> dict[str, Any]:
    """Every gauge that this model allows; each entry has its own n, value and interval, or the reason it has none."""
    base, sides = base_model(sides)
    if writes(base, sides.loaded.layout.head, sides.loaded.processor):
        entries = _words(sides, base)
    else:
        entries = _states(sides, base)
    if all("not_run" in entry for entry in entries):
        raise NotRun(entries[0]["not_run"])
    return {"gauges": entries, "sentence": _sentence(entries), "limits": list(LIMITS), "seed": sides.seed}


def _sentence(entries: Sequence[dict[str, Any]]) -> str:
    first = next(entry for entry in entries if "not_run" not in entry)
    low, high = first["ci95"]
    return (
        f"On {first['on']} ({first['n']} {first['unit_of_n']}) it moved by {first['value']:.3g} {first['unit']} "
        f"(95% interval {low:.3g} to {high:.3g}); the base against itself moves by {first['floor']:.3g}."
    )


def _entry(name: str, on: str, unit: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """A mean over inputs with its interval; 0 is no movement."""
    paired = statistics.compare([0.0] * len(values), values)
    low, high = paired.ci95
    found = {"name": name, "on": on, "unit": unit, "n": paired.n, "unit_of_n": "inputs", "value": paired.difference}
    return found | {"ci95": [max(0.0, low), max(0.0, high)], "method": paired.method.partition(",")[0]} | more


# ------------------------------------------------------------------ language models
Rows = list[tuple[Tensor, Tensor]]  # ids (T,) and which of ids[1:] count (T - 1,)


def _words(sides: Sides, base: nn.Module) -> list[dict[str, Any]]:
    """Gauges b and c: how the next word's probabilities moved, token by token."""
    drawn = [(ids, torch.ones(len(ids) - 1, dtype=torch.bool)) for ids in _samples(sides, base) if len(ids) > 1]
    sets: list[tuple[str, str, Rows]] = [
        ("KL on the base's own texts", "texts that the base itself writes", drawn),
        ("KL on neutral texts", "neutral texts", _neutral_ids(sides)),
    ]
    if sides.task.packs:
        sets.append(("KL on the task's own inputs", "the task's own test rows", _task_ids(sides)))
    entries = [_kl_entry(name, on, base, sides.tuned, rows) for name, on, rows in sets]
    if not sides.task.packs:
        reason = "an example of this task is not one sequence of words"
        entries.append({"name": "KL on the task's own inputs", "on": "the task's own test rows", "not_run": reason})
    return entries


def _samples(sides: Sides, base: nn.Module) -> list[Tensor]:
    tokenizer = sides.loaded.processor
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else (ends or [0])[0]
    found: list[Tensor] = []
    for place in range(0, SAMPLES, DRAWN_AT_ONCE):
        seed = derive_seed(sides.seed, "samples", place)
        found += sample_ids(base, start, DRAWN_AT_ONCE, SAMPLED_TOKENS, seed, ends)
    return found


def _neutral_ids(sides: Sides) -> Rows:
    tokenizer = sides.loaded.processor
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [before + tokenizer(t, add_special_tokens=False)["input_ids"][:LONGEST] for t in neutral.texts()]
    return [(torch.tensor(ids), torch.ones(len(ids) - 1, dtype=torch.bool)) for ids in rows if len(ids) > 1]


def _task_ids(sides: Sides) -> Rows:
    """Test rows as the task reads them; only what it has to say counts, not what it is asked."""
    rows: Rows = []
    for record in _some(sides.test, TASK_ROWS, sides.seed):
        example = sides.task.encode(record, sides.loaded)
        ids, labels = example["input_ids"][-TASK_TOKENS:], example["labels"][-TASK_TOKENS:]
        if (labels[1:] != IGNORE).any():
            rows.append((ids, labels[1:] != IGNORE))
    return rows


def _some(records: Sequence[Record], most: int, seed: int) -> list[Record]:
    if len(records) <= most:
        return list(records)
    chosen = random.Random(derive_seed(seed, "rows")).sample(range(len(records)), most)  # noqa: S311
    return [records[i] for i in sorted(chosen)]


def _kl_entry(name: str, on: str, base: nn.Module, tuned: nn.Module, rows: Rows) -> dict[str, Any]:
    if not rows:
        return {"name": name, "on": on, "not_run": "there is no text of two tokens or more"}
    sums, counts, same = token_kl(base, tuned, rows)
    per_text = [nats / n for nats, n in zip(sums, counts, strict=True)]
    if min(per_text) < TIES:
        raise ArithmeticError(f"a KL of {min(per_text):.3g} nats: it cannot be below 0")
    few = rows[:8]
    floor = token_kl(base, base, few)[0]
    found = _entry(name, on, "nats a token", per_text, floor=sum(floor) / len(few), unit_of_n="texts")
    return found | {"tokens": sum(counts), "per_token": sum(sums) / sum(counts), "same_next_word": same / sum(counts)}


def token_kl(base: nn.Module, tuned: nn.Module, rows: Rows) -> tuple[list[float], list[int], int]:
    """KL(base || tuned) of each text, in nats summed over its counted tokens; how many those are; and at how many of
    all of them both hold the same word for the likeliest."""
    sums, counts, same = [0.0] * len(rows), [int(counted.sum()) for _, counted in rows], 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    while order:
        size = max(1, TOKENS_AT_ONCE // len(rows[order[0]][0]))
        chosen, order = order[:size], order[size:]
        batch = _padded([rows[i] for i in chosen])
        before, after = (_logits(model, batch) for model in (base, tuned))
        words = min(before.shape[-1], after.shape[-1])  # one of them may have grown by a few new tokens
        text = batch["counted"].nonzero()[:, 0].tolist()
        for start in range(0, len(text), LOGITS_AT_ONCE):
            part = [side[start : start + LOGITS_AT_ONCE, :words].float() for side in (before, after)]
            same += int((part[0].argmax(-1) == part[1].argmax(-1)).sum())
            for place, nats in zip(text[start:], kl_divergence(*part).double().tolist(), strict=False):
                sums[chosen[place]] += nats
    return sums, counts, same


def _padded(rows: Rows) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, counted = torch.zeros_like(ids), torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    for i, (one, counts) in enumerate(rows):
        ids[i, : len(one)], mask[i, : len(one)], counted[i, : len(counts)] = one, 1, counts
    return {"input_ids": ids, "attention_mask": mask, "counted": counted}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What one forward pass says at the counted tokens: (N, V), on the CPU."""
    with asking(model) as device:
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[batch["counted"].to(device)].cpu()


# ------------------------------------------------------------ encoders and vision
def _states(sides: Sides, base: nn.Module) -> list[dict[str, Any]]:
    """Gauge d, and c where the head is the base's own."""
    with tempfile.TemporaryDirectory() as folder:
        records = neutral.records(sides.task.fields, Path(folder))
        if records is None:
            kinds = ", ".join(sorted({f.kind for f in sides.task.fields.values() if f.kind != "label"}))
            raise NotRun(f"no neutral inputs are packaged for fields of kind {kinds}")
        on = "drawn pictures" if any(f.kind == "image" for f in sides.task.fields.values()) else "neutral texts"
        entries = [*_likeness(sides, base, records, on), _old_head(sides, base, records, on)]
    return [*entries, _answers(sides)]


def _likeness(sides: Sides, base: nn.Module, records: Sequence[Record], on: str) -> list[dict[str, Any]]:
    name = "change of the last layer (1 - CKA)"
    before, after = (_vectors(sides, model, records) for model in (base, sides.tuned))
    if before is None or after is None:
        return [{"name": name, "on": on, "not_run": "the model does not show its last layer"}]
    again = _vectors(sides, base, records)
    assert again is not None
    value, (low, high) = similarity.cka_with_interval(before, after)
    if math.isnan(value):
        return [{"name": name, "on": on, "not_run": "all inputs look the same to this model"}]
    cka = {"name": name, "on": on, "unit": "of at most 1", "n": len(records), "unit_of_n": "inputs", "value": 1 - value,
           "ci95": [1 - high, 1 - low], "floor": 1 - similarity.linear_cka(before, again),
           "method": "jackknife"}  # fmt: skip
    lost = [1 - share for share in similarity.neighbour_overlap(before, after)]
    floor = 1 - statistics.compare([0.0] * len(lost), similarity.neighbour_overlap(before, again)).difference
    near = f"change of the {similarity.NEIGHBOURS} nearest neighbours"
    return [cka, _entry(near, on, "of at most 1", lost, floor=floor)]


def _vectors(sides: Sides, model: nn.Module, records: Sequence[Record]) -> Tensor | None:
    """(N, D): the last layer of each input, averaged over its places."""
    with last_states(model) as found:
        _ask(sides, model, records)
    return torch.cat(found) if found else None


def _ask(sides: Sides, model: nn.Module, records: Sequence[Record]) -> list[Prediction]:
    """Answers to rows without targets, in their order: the batches here are stretches of it."""
    answers: list[Prediction] = []
    with asking(model) as device:
        for start in range(0, len(records), sides.batch_size):
            some = records[start : start + sides.batch_size]
            batch = sides.task.collate([sides.task.encode(r, sides.loaded, target=False) for r in some])
            answers += sides.task.predict(model, to_device(batch, device), sides.loaded)
    return answers


def _old_head(sides: Sides, base: nn.Module, records: Sequence[Record], on: str) -> dict[str, Any]:
    """How many neutral inputs the base's own head answers otherwise once the body under it is the tuned one."""
    name = "change of the old head's answers"
    try:
        before, after = _old_answers(sides, base, records)
    except NotRun as reason:
        return {"name": name, "on": on, "not_run": str(reason)}
    if not all("label" in p for p in (*before, *after)):
        return {"name": name, "on": on, "not_run": "its answers are no labels"}
    other = [float(b["label"] != a["label"]) for b, a in zip(before, after, strict=True)]
    return _entry(name, on, "of at most 1", other)


def _old_answers(sides: Sides, base: nn.Module, records: Sequence[Record]) -> tuple[list[Prediction], list[Prediction]]:
    if not sides.loaded.fresh:
        return _ask(sides, base, records), _ask(sides, sides.tuned, records)
    if sides.plain is None:
        raise NotRun("the tuned body cannot be put under the base's own head: this method does not fold")
    try:
        old = opened(sides, ())
    except NotRun as reason:
        raise NotRun("the base has no head of its own") from reason
    if old.fresh:
        raise NotRun("the base has no head of its own")
    own = replace(sides, loaded=old)
    before = _ask(own, old.model, records)
    tuned, places = weights.weights(sides.plain()), weights.weights(old.model)
    weights.put(old.model, {n: tuned[n] for n in weights.in_common(places, tuned, sides.loaded.fresh)})
    return before, _ask(own, old.model, records)


def _answers(sides: Sides) -> dict[str, Any]:
    """Gauge c of a classifier: the KL of its probabilities on the test rows, which both sides have answered already."""
    name, on = "KL of the answers", "the task's own test rows"
    if sides.loaded.fresh or sides.base is None:
        return {"name": name, "on": on, "not_run": "the base had no head for these labels"}
    if not all("scores" in p for p in (*sides.before, *sides.after)):
        return {"name": name, "on": on, "not_run": "its answers are no probabilities of labels"}
    values = [_label_kl(b["scores"], a["scores"]) for b, a in zip(sides.before, sides.after, strict=True)]
    floor = sum(_label_kl(b["scores"], b["scores"]) for b in sides.before)
    return _entry(name, on, "nats a row", values, floor=floor, unit_of_n="rows")


def _label_kl(base: dict[str, float], tuned: dict[str, float]) -> float:
    return sum(p * (math.log(max(p, TINY)) - math.log(max(tuned[name], TINY))) for name, p in base.items())
