"""TRL's SFTTrainer as a peer, in equal precision without gradient checkpointing, and once by its own defaults.

Counted is `trainer.train()`; tokenising and packing are not. Knows nothing of tunewright.
"""

from __future__ import annotations

import tempfile
from typing import Any

import peer_data
from peer_meter import Meter
from peer_trainer import adapter, arguments, losses
from peer_works import Work

WORDS = {
    "free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": peer_data.LONGEST},
}
FORCED = ("bf16", "gradient_checkpointing", "train_sampling_strategy", "remove_unused_columns")


def run(work: Work, configuration: str, inputs: dict[str, str], meter: Meter) -> dict[str, Any]:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    transformers.set_seed(0)
    named = arguments(work, configuration) | {"max_length": peer_data.LONGEST, "completion_only_loss": True}
    named.pop("remove_unused_columns")  # TRL's own columns are none of the model's
    if configuration == "defaults":
        named = {key: value for key, value in named.items() if key not in FORCED}
    rows = peer_data.read(inputs["tokens"])
    masked = [
        {"input_ids": r["input_ids"], "completion_mask": [int(i != peer_data.IGNORE) for i in r["labels"]]}
        for r in rows
    ]
    dtype = torch.bfloat16 if "half" in configuration else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(inputs["model"], dtype=dtype)
        with meter.preparing():
            trainer = trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(folder, **(named | WORDS.get(configuration.partition("-")[0], {}))),
                train_dataset=Dataset.from_list(masked),
                processing_class=transformers.AutoTokenizer.from_pretrained(inputs["model"]),
                peft_config=adapter(work) if work.method == "lora" else None,
            )
        with meter.training():
            trainer.train()
    used = {k: getattr(trainer.args, k) for k in ("bf16", "gradient_checkpointing", "packing", "padding_free")}
    return {"losses": losses(trainer), "steps": trainer.state.global_step, "notes": [f"{used}"]}
