"""What is measured against the peers: each work, its sides, and the words of its configuration. Runs nothing.

A side is named by who runs it and, behind hyphens, by what is not its plain configuration: "trainer-flat-half". The
plain configuration of every side is equal in precision, rows, batch size, optimiser, rate and checkpointing (none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OURS = "tunewright"
RANK, ALPHA = 16, 32
SHAPES = {"15m": (288, 6, 6, 768), "100m": (768, 12, 12, 2048)}  # hidden, layers, heads, MLP: Karpathy's llama2.c
VOCABULARY = 32_000

# What a side's name stands for; told beside its figures
SIDES = {
    "tunewright": "ours, as a user gets it",
    "tunewright-steps": "ours, `method.solver: steps`: as many gradient steps as the Trainer takes",
    "tunewright-half": "ours, `model.dtype: bfloat16`: frozen weights stored in bf16",
    "trainer": "transformers.Trainer (+ peft), rows padded to the longest of their batch",
    "trainer-grouped": "Trainer, `train_sampling_strategy=group_by_length`",
    "trainer-grouped-half": "Trainer, group_by_length, frozen weights stored in bf16",
    "trainer-flat": "Trainer, `DataCollatorWithFlattening`: no padding",
    "trainer-flat-half": "Trainer, no padding, frozen weights stored in bf16",
    "trainer-still": "Trainer, batch norm kept in eval mode, as ours keeps it",
    "trainer-flat-lent": "Trainer, no padding, and our choice of float32 products lent to it: a line of torch's",
    "trainer-grouped-lent": "Trainer, group_by_length, and our choice of float32 products lent to it",
    "trl": "TRL SFTTrainer, no gradient checkpointing, padded",
    "trl-grouped": "TRL, no gradient checkpointing, group_by_length",
    "trl-free": "TRL, no gradient checkpointing, `padding_free=True`",
    "trl-free-half": "TRL, no gradient checkpointing, `padding_free=True`, frozen weights stored in bf16",
    "trl-packing": "TRL, no gradient checkpointing, `packing=True`: other rows share a step, fewer steps",
    "trl-defaults": "TRL's own defaults: bf16 and gradient checkpointing, whatever the precision of the others",
    "llamafactory": "LLaMA-Factory in its own environment, no gradient checkpointing, padded",
    "tunewright-cold": "ours, `head`, no cache left by anybody",
    "tunewright-warm-seed": "ours, `head` with another seed, beside the cache of the first run",
    "tunewright-warm-layers": "ours, `layers` with `last: 1`, beside the cache of the first run",
    "tunewright-cold-layers": "ours, `layers` with `last: 1`, no cache left by anybody",
    "tunewright-alone": "ours, its own number of threads",
    "tunewright-beside1": "ours, beside one process that never rests",
    "tunewright-beside2": "ours, beside two processes that never rest",
    "trainer-alone": "Trainer, its own number of threads",
    "trainer-beside1": "Trainer, beside one process that never rests",
    "trainer-beside2": "Trainer, beside two processes that never rest",
}
# Not the same arithmetic: published, and never the peer to beat
UNEQUAL = ("trl-defaults", "trl-packing")
LENT = "lent"  # a peer with something of ours that it does not choose by itself: shown, and never the peer to beat
REORDERED = ("grouped", "packing", "defaults")  # words of sides whose steps hold other rows than ours


@dataclass(frozen=True)
class Work:
    """One line of the figures table.

    rows: how many training rows by default.   threads: None leaves them to each side.
    target: how many times as fast as the best peer, at least; for `warm` as itself cold.
    memory: our peak as a share of that peer's, at most.   slower: beside others against alone, at most.
    """

    name: str
    kind: Literal["sft", "cls", "img"]
    base: str
    method: str
    sides: tuple[str, ...]
    rows: int
    rate: float
    target: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    batch: int = 8
    epochs: int = 1
    memory: float | None = None
    slower: float | None = None
    threads: int | None = 1


PADDED = (OURS, "trainer", "trainer-grouped")
TRL = ("trl", "trl-grouped", "trl-free", "trl-packing", "trl-defaults", "llamafactory")
HEAD = (OURS, "tunewright-steps", "trainer")
WARM = ("tunewright-cold", "tunewright-warm-seed", "tunewright-warm-layers", "tunewright-cold-layers")
BESIDE = {"beside1": 1, "beside2": 2}  # processes that keep a core each busy
BUSY = tuple(f"{who}-{where}" for where in ("alone", *BESIDE) for who in (OURS, "trainer"))


def _sft(base: str, rows: int, target: float, bf16: float) -> list[Work]:
    flat = ("trainer-flat", "trainer-flat-lent")
    fp32 = Work(f"sft-lora-{base}", "sft", base, "lora", (*PADDED, *flat, *TRL), rows, 2e-4, target)
    half = ("tunewright-half", "trainer-grouped-half", "trainer-flat-half", "trl-free-half")
    sides = (*PADDED, "trainer-flat", *TRL, *half)
    return [fp32, Work(f"{fp32.name}-bf16", "sft", base, "lora", sides, rows, 2e-4, bf16, "bf16", memory=0.4)]


def _texts(method: str, rate: float, target: float, epochs: int = 3) -> Work:
    sides = (*(HEAD if method == "head" else (OURS, "trainer")), "trainer-grouped", "trainer-grouped-lent")
    name = f"cls-{method}" + ("-10" if epochs == 10 else "")
    return Work(name, "cls", "minilm", method, sides, 2000, rate, target, batch=16, epochs=epochs)


def _images(base: str, method: str, rate: float, target: float) -> Work:
    ours = HEAD if method == "head" else (OURS, "trainer")
    sides = (*ours, "trainer-still") if base == "mobilenet" else ours  # a ViT has no batch norm
    return Work(f"img-{method}-{base}", "img", base, method, sides, 245, rate, target, batch=16, epochs=3)


WORKS = {
    work.name: work
    for work in (
        *_sft("15m", 64, 3.0, 3.0),
        *_sft("100m", 24, 3.3, 4.0),
        Work("sft-full-15m", "sft", "15m", "full", (*PADDED, "trainer-flat", "trl", "trl-grouped"), 64, 1e-4, 2.0),
        _texts("head", 3e-3, 7.0),
        _texts("head", 3e-3, 20.0, epochs=10),
        _texts("lora", 1e-3, 2.0),
        _texts("full", 5e-5, 1.7),
        _images("mobilenet", "head", 3e-3, 4.0),
        _images("mobilenet", "full", 1e-4, 1.25),
        _images("vit", "head", 3e-3, 4.0),
        _images("vit", "full", 1e-4, 1.25),
        Work("warm", "cls", "minilm", "head", WARM, 2000, 3e-3, 3.0, batch=16, epochs=3),
        Work("threads", "sft", "15m", "lora", BUSY, 32, 2e-4, slower=1.3, threads=None),
    )
}
