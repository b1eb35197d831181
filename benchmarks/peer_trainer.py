"""transformers.Trainer (+ peft) as a peer: the same rows, model, optimiser and precision, its best configuration found.

Counted is `trainer.train()`; tokenising and building the Trainer are not. Knows nothing of tunewright.
"""

from __future__ import annotations

import tempfile
from typing import Any

import peer_data
from peer_meter import Meter
from peer_works import ALPHA, RANK, RATE, Work


def run(work: Work, configuration: str, inputs: dict[str, str], meter: Meter) -> dict[str, Any]:
    import transformers

    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model = opened(work, configuration, inputs)
        with meter.preparing():
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(folder, **arguments(work, configuration)),
                train_dataset=Rows(peer_data.read(inputs["tokens"])),
                data_collator=collator(configuration, tokenizer, model),
            )
        with meter.training():
            trainer.train()
    return {"losses": losses(trainer), "steps": trainer.state.global_step}


def opened(work: Work, configuration: str, inputs: dict[str, str]) -> tuple[Any, Any]:
    """Tokenizer and model, with the adapter put on where the work asks for one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if configuration == "half" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(inputs["model"], dtype=dtype)
    model.config.use_cache = False
    if work.method == "lora":
        import peft

        model = peft.get_peft_model(model, adapter())
    return AutoTokenizer.from_pretrained(inputs["model"]), model


def adapter() -> Any:
    import peft

    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def arguments(work: Work, configuration: str) -> dict[str, Any]:
    """TrainingArguments that equal our recipe; everything else stays the Trainer's own choice."""
    sampling = "group_by_length" if configuration in ("grouped", "half") else "sequential"
    return {
        "per_device_train_batch_size": work.batch, "num_train_epochs": work.epochs, "learning_rate": RATE[work.method],
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "bf16": work.precision == "bf16", "use_cpu": True, "dataloader_pin_memory": False, "seed": 0,
        "train_sampling_strategy": sampling, "remove_unused_columns": False, "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip


def collator(configuration: str, tokenizer: Any, model: Any) -> Any:
    import transformers

    if configuration == "flat":
        return transformers.DataCollatorWithFlattening()
    return transformers.DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=peer_data.IGNORE)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class Rows(list):
    """Rows in memory: a data set as Trainer takes it, with nothing between it and the rows."""
