"""The demo's second part, a smoke test on pictures: scikit-learn's digits and a toy model that is made on the spot.

It shows that another modality goes the same way, not how good real models are. Needs the extra [demo].
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs.training import train
from tunewright.uses.comparison import as_text, compare

LABEL = "Smoke test on pictures: a toy model made just now, so its scores say nothing of real models"
TOY: dict[str, Any] = {
    "num_channels": 3, "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic",
    "id2label": {i: str(i) for i in range(5)}, "label2id": {str(i): i for i in range(5)},
}  # fmt: skip
SIDE = 32  # pixels: the digits are 8 x 8, and the toy halves a picture four times
# float32: in bf16 such small convolutions took two to fifteen times as long on a CPU with AVX512-bf16
STEPPED = {"num_train_epochs": 5, "per_device_train_batch_size": 32, "learning_rate": 5e-3, "precision": "float32"}

Say = Callable[[str], None]


def smoke_test(out: Path, *, say: Say) -> dict[str, Any]:
    """A toy learns the digits 0 to 4, which makes it a base; `head` and `full` then teach it 5 to 9."""
    if importlib.util.find_spec("sklearn") is None:
        return {"text": f'{LABEL}: skipped, scikit-learn is not here: pip install "tunewright[demo]"'}
    say(f"\n--- {LABEL}")
    old, new = _write_digits(out)
    untrained = out / "untrained"
    if not untrained.is_dir():
        _new_toy(untrained)
    # new batch norms know no statistics yet, so that here, and only here, they learn them
    base = _tune(out / "base", untrained, old, "full", STEPPED | {"train_batch_norm": True}, say)
    choices: dict[str, dict[str, Any]] = {"head": {}, "full": STEPPED}
    runs = [_tune(out / name, base.path / "model", new, name, options, say) for name, options in choices.items()]
    table = compare([run.path for run in runs])
    lines = [LABEL, "(base: learned the digits 0 to 4; tuned: learns 5 to 9)", as_text(table)]
    for run in runs:
        lines.append(f"{run.path.name}: {run.read_json('evidence.json')['verdict']['sentence']}")
        lines.append(f"  report: {run.path / 'report.html'}")
    return table | {"label": LABEL, "text": "\n".join(lines)}


def _tune(out: Path, model: Path, data: Path, method: str, options: dict[str, Any], say: Say) -> RunDir:
    tree = {
        "model": str(model), "task": "image-classification", "data": {"train": str(data), "holdout": 0.28},
        "method": method, "train": options, "output_dir": str(out),
    }  # fmt: skip
    recipe = out.with_name(f"{out.name}.yaml")
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    say(f"\n--- tunewright train {recipe}")
    return train(Recipe.of(tree)[0], out, say=say)


def _write_digits(out: Path) -> tuple[Path, Path]:
    """Scikit-learn's 1797 digits as PNG files in class folders: 0 to 4, and 5 to 9."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = out / ("digits-0-4" if label < 5 else "digits-5-9") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / f"{i}.png").exists():
            Image.fromarray((pixels * 255 / 16).astype("uint8")).convert("RGB").save(folder / f"{i}.png")
    return out / "digits-0-4", out / "digits-5-9"


def _new_toy(folder: Path) -> None:
    """A small ResNet with random weights, and how its pictures are prepared."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**TOY)).save_pretrained(folder)
    processor = {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE}, "crop_pct": 1.0,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
