"""What is measured against the peers: each work, its sides, and the words of its configuration. Runs nothing.

A side is named by who runs it and, behind a hyphen, by what is not its plain configuration: "trainer-grouped". The
plain configuration of every side is equal in precision, rows, batch size, optimiser, rate and checkpointing (none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OURS = "tunewright"
RATE = {"lora": 2e-4, "full": 1e-4}
RANK, ALPHA = 16, 32
PADDING = ("trainer", "trainer-grouped")
SHAPES = {"15m": (288, 6, 6, 768), "100m": (768, 12, 12, 2048)}  # hidden, layers, heads, MLP: Karpathy's llama2.c
VOCABULARY = 32_000

# What a side's name stands for, told in the table
SIDES = {
    "tunewright": "ours, as a user gets it",
    "trainer": "transformers.Trainer (+ peft), padded, the same rows in the same order",
    "trainer-grouped": "Trainer, train_sampling_strategy=group_by_length",
    "trainer-half": "Trainer, group_by_length, frozen weights stored in bf16",
    "trainer-flat": "Trainer, DataCollatorWithFlattening (no padding)",
    "trl": "TRL SFTTrainer, no gradient checkpointing, padded",
    "trl-grouped": "TRL, no gradient checkpointing, group_by_length",
    "trl-free": "TRL, no gradient checkpointing, padding_free=True",
    "trl-packing": "TRL, no gradient checkpointing, packing=True",
    "trl-defaults": "TRL's own defaults (bf16, gradient checkpointing): other precision and checkpointing",
    "llamafactory": "LLaMA-Factory, its own environment: the whole process, reading the rows included",
}


@dataclass(frozen=True)
class Work:
    """One line of the figures table.

    rows: how many of the training rows by default; None: all there are.
    target: how many times as fast as the best peer, at least.   memory: our peak as a share of that peer's, at most.
    """

    name: str
    kind: Literal["sft"]
    base: str
    method: str
    sides: tuple[str, ...]
    target: float
    precision: Literal["float32", "bf16"] = "float32"
    rows: int | None = None
    batch: int = 8
    epochs: int = 1
    memory: float | None = None


TRL = ("trl", "trl-grouped", "trl-free", "trl-packing", "trl-defaults", "llamafactory")
WORKS = {
    work.name: work
    for work in (
        Work("sft-lora-15m", "sft", "15m", "lora", (OURS, *PADDING, "trainer-flat", *TRL), 3.0, rows=64),
        Work("sft-lora-100m", "sft", "100m", "lora", (OURS, *PADDING, "trainer-flat", *TRL), 3.3, rows=24),
        Work("sft-lora-15m-bf16", "sft", "15m", "lora", (OURS, *PADDING, "trainer-half", *TRL), 3.0, "bf16", 64,
             memory=0.4),
        Work("sft-lora-100m-bf16", "sft", "100m", "lora", (OURS, *PADDING, "trainer-half", *TRL), 4.0, "bf16", 24,
             memory=0.4),
        Work("sft-full-15m", "sft", "15m", "full", (OURS, *PADDING, "trainer-flat", "trl", "trl-grouped"), 2.0,
             rows=64),
    )
}  # fmt: skip
