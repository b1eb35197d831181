"""LLaMA-Factory as a peer, through its own `run_exp`, in its own environment: other torch, transformers and peft.

Counted is what its trainer's `train()` takes, as with the others. Knows nothing of tunewright.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from peer_meter import Meter
from peer_trainer import losses
from peer_works import ALPHA, RANK, Work


def run(work: Work, configuration: str, inputs: dict[str, str], meter: Meter) -> dict[str, Any]:
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    kept = []

    class Counted(workflow.CustomSeq2SeqTrainer):
        def train(self, *args: Any, **named: Any) -> Any:
            kept.append(self)
            with meter.training():
                return super().train(*args, **named)

    workflow.CustomSeq2SeqTrainer = Counted
    with tempfile.TemporaryDirectory() as folder:
        run_exp(arguments(work, inputs, Path(folder)))
    trainer = kept[0]
    used = {name: getattr(trainer.args, name) for name in ("bf16", "gradient_checkpointing")}
    return {"losses": losses(trainer), "steps": trainer.state.global_step, "notes": [f"{used}"]}


def arguments(work: Work, inputs: dict[str, str], folder: Path) -> dict[str, Any]:
    """Its own words for our recipe; everything else stays its own choice."""
    columns = {"prompt": "prompt", "response": "completion"}
    described = {"rows": {"file_name": inputs["spoken"], "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    return {
        "stage": "sft", "do_train": True, "model_name_or_path": inputs["model"], "dataset": "rows",
        "dataset_dir": str(folder), "output_dir": str(folder / "run"), "overwrite_cache": True, "cutoff_len": 1024,
        "finetuning_type": work.method, "lora_target": "all", "lora_rank": RANK, "lora_alpha": ALPHA,
        "lora_dropout": 0.0, "disable_gradient_checkpointing": True, "disable_shuffling": True, "flash_attn": "sdpa",
        "per_device_train_batch_size": work.batch, "gradient_accumulation_steps": 1, "learning_rate": work.rate,
        "num_train_epochs": work.epochs, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "bf16": work.precision == "bf16", "use_cpu": True, "dataloader_pin_memory": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
