"""transformers.Trainer (+ peft) as a peer: the same rows, model, optimiser and precision, its best configuration found.

Counted is `trainer.train()`, and for photographs their one preparation in memory, since ours prepares them there too;
tokenising and building the Trainer are not. Knows nothing of tunewright.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peer_data
from peer_meter import Meter
from peer_works import ALPHA, RANK, Work

KINDS = {"sft": "CAUSAL_LM", "cls": "SEQ_CLS", "img": None}  # peft's names
CLASSES = {
    "sft": "AutoModelForCausalLM",
    "cls": "AutoModelForSequenceClassification",
    "img": "AutoModelForImageClassification",
}


def run(work: Work, configuration: str, inputs: dict[str, str], meter: Meter) -> dict[str, Any]:
    import transformers

    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = opened(work, configuration, inputs)
        with meter.training() if work.kind == "img" else meter.preparing():
            rows, collator = prepared(work, configuration, inputs, "train")
        with meter.preparing():
            arranged = transformers.TrainingArguments(folder, **arguments(work, configuration))
            trainer = transformers.Trainer(model=model, args=arranged, train_dataset=rows, data_collator=collator)
        with meter.training():
            trainer.train()
    found = {"losses": losses(trainer), "steps": trainer.state.global_step}
    return found if work.kind == "sft" else found | {"accuracy": accuracy(work, model, inputs)}


# ---------------------------------------------------------------------- model
def opened(work: Work, configuration: str, inputs: dict[str, str]) -> Any:
    """The model, frozen or with its adapter as the work asks."""
    import torch
    import transformers

    if "lent" in configuration:  # what engine/products.py chooses on a processor of this kind
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    dtype = torch.bfloat16 if "half" in configuration else torch.float32
    words = {} if work.kind == "sft" else {"num_labels": 2, "ignore_mismatched_sizes": True}
    place = inputs.get("local", inputs["model"])
    model = getattr(transformers, CLASSES[work.kind]).from_pretrained(place, dtype=dtype, **words)
    if work.kind == "sft":
        model.config.use_cache = False
    if work.method == "lora":
        import peft

        torch.manual_seed(peer_data.adapter_seed())
        model = peft.get_peft_model(model, adapter(work))
    if work.method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("classifier")
    if "still" in configuration:
        keep_still(model)
    return model


def adapter(work: Work) -> Any:
    import peft

    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type=KINDS[work.kind]
    )


def keep_still(model: Any) -> None:
    """Batch norm in eval mode, whatever the Trainer says before every step."""
    from torch import nn

    plain = model.train

    def train(mode: bool = True) -> Any:
        plain(mode)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return model

    model.train = train


def arguments(work: Work, configuration: str) -> dict[str, Any]:
    """TrainingArguments that equal our recipe; everything else stays the Trainer's own choice."""
    # rows of the language works lie in the order in which ours takes them, so that losses can be compared
    plain = "sequential" if work.kind == "sft" else "random"
    return {
        "per_device_train_batch_size": work.batch, "num_train_epochs": work.epochs, "learning_rate": work.rate,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "bf16": work.precision == "bf16", "use_cpu": True, "dataloader_pin_memory": False, "seed": 0,
        "train_sampling_strategy": "group_by_length" if "grouped" in configuration else plain,
        "remove_unused_columns": False, "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip


# ----------------------------------------------------------------------- rows
def prepared(work: Work, configuration: str, inputs: dict[str, str], split: str) -> tuple[list[Any], Any]:
    """Rows as tensors or ids in memory, and what makes batches of them."""
    import transformers

    if work.kind == "img":
        return pictures(inputs, split), stacked
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.get("local", inputs["model"]))
    if work.kind == "cls":
        rows = peer_data.read(inputs[split])
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=512)["input_ids"]
        found = [{"input_ids": i, "labels": row["label"]} for i, row in zip(ids, rows, strict=True)]
        return found, transformers.DataCollatorWithPadding(tokenizer)
    rows = peer_data.read(inputs["tokens"])
    if "flat" in configuration:
        return rows, transformers.DataCollatorWithFlattening()
    return rows, transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=peer_data.IGNORE)


def pictures(inputs: dict[str, str], split: str) -> list[dict[str, Any]]:
    """Every photograph read and prepared once, by the checkpoint's own processor on PIL, as ours does it."""
    import transformers
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(inputs["model"], backend="pil")
    found = []
    for path in sorted(Path(inputs[split]).rglob("*.jpg")):
        with Image.open(path) as picture:
            pixels = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        found.append({"pixel_values": pixels, "labels": int(path.parent.name == "bees")})
    return found


def stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


# -------------------------------------------------------------------- results
def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def accuracy(work: Work, model: Any, inputs: dict[str, str]) -> float:
    """The share of held-out rows that the trained model gets right. Not counted."""
    import torch

    rows, collator = prepared(work, "", inputs, "test")
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            batch = collator(rows[start : start + 32])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)
