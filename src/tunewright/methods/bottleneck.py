"""Bottleneck adapters: a small network behind (or beside) each sub-layer of a frozen model.

Use it when many tasks share one base and each keeps a small file, or when the change should not be linear; elsewhere
LoRA is as good and, unlike this, can be folded into the weights.

Houlsby et al. 2019, arXiv 1902.00751 (behind attention and feed-forward); Pfeiffer et al. 2020, arXiv 2005.00247
(behind feed-forward); He et al. 2022, arXiv 2110.04366 (beside feed-forward, scaled); for convolutions Rebuffi et al.
2017, arXiv 1705.08045. Layer norms stay frozen, which Houlsby trains too. Knows Layout, never a model class.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from tunewright.contracts import Loaded, Method
from tunewright.errors import Fault, MethodError
from tunewright.models import bottleneck_modules as modules
from tunewright.models.places import Place, attentions, feed_forwards, own_head
from tunewright.models.surgery import freeze

LEAST = 8  # numbers in a bottleneck made by reduction_factor: a sixteenth of a narrow convolutional unit would be one
SETTINGS, WEIGHTS = "bottleneck_config.json", "adapter.safetensors"


@dataclass(frozen=True)
class Bottleneck(Method):
    # houlsby: behind attention and feed-forward; pfeiffer: behind feed-forward; parallel: beside feed-forward. Before
    # the residual and the norm. In a convolutional net: behind each unit, or beside it
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    reduction_factor: int = 16  # the bottleneck is the sub-layer's width divided by this; 8 to 16
    bottleneck_size: int | None = None  # or this many numbers, whatever the width
    scale: float = 4.0  # of what a parallel adapter adds; 4 as in He et al.

    learning_rate: ClassVar[float] = 1e-3
    learning_rate_reason: ClassVar[str] = (
        "adapters learn between 1e-4 and 1e-3; the upper end was best on small encoders"
    )
    standalone: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.placement not in ("houlsby", "pfeiffer", "parallel"):
            raise ValueError(f'placement is "{self.placement}": houlsby, pfeiffer or parallel')
        if self.reduction_factor < 1:
            raise ValueError(f"reduction_factor is {self.reduction_factor}: 1 or more")
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size is {self.bottleneck_size}: 1 or more, or nothing for width / factor")
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}: above 0")

    @property
    def keeps_base(self) -> bool:
        return True

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        places = feed_forwards(model, loaded.layout)
        if self.placement == "houlsby":
            places = attentions(model, loaded.layout) + places
        if not places:
            problem = (
                "no sub-layer found behind which an adapter could stand (layers that repeat, with matrix products)"
            )
            raise MethodError(
                Fault(problem, where="method bottleneck", remedy="Use method=lora, method=head or method=full.")
            )
        freeze(model)
        for place in places:
            modules.attach(model, place, self._size(place), self._scale)
        for head in own_head(model, loaded):
            modules.keep_head(model, head)
        return model

    @property
    def _scale(self) -> float | None:
        return self.scale if self.placement == "parallel" else None

    def _size(self, place: Place) -> int:
        return self.bottleneck_size or max(LEAST, place.width // self.reduction_factor)

    def reference(self, model: nn.Module, start: nn.Module | None) -> AbstractContextManager[nn.Module]:
        return modules.switched_off(model)

    def merge(self, model: nn.Module) -> nn.Module:
        problem = "an adapter with a bend in its middle cannot be folded into the weights"
        remedy = "Use the run as it is: its model/ and its base. What method=lora or method=full trains can be folded."
        raise MethodError(Fault(problem, where="method bottleneck", remedy=remedy))

    # ----------------------------------------------------------------- in the file
    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        """There is no format of the field for these: tensors, the places they belong to, and `opening`."""
        from safetensors.torch import save_file

        tensors = {name: tensor.cpu().contiguous() for name, tensor in modules.tensors_of(model).items()}
        save_file(tensors, folder / WEIGHTS)
        settings: dict[str, Any] = {
            "method": "bottleneck",
            "placement": self.placement,
            "activation": "gelu",
            "scale": self._scale,
            "base": loaded.origin,
            "adapters": [asdict(added.place) | {"size": added.size} for added in modules.adapters(model).values()],
            "heads": list(modules.heads(model)),
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]  # label names stand here
        loaded.processor.save_pretrained(folder)

    def open(self, loaded: Loaded, folder: Path) -> nn.Module:
        """By what the file says and not by the options: they may have been given otherwise."""
        from safetensors.torch import load_file

        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        for entry in settings["adapters"]:
            size = entry.pop("size")
            modules.attach(loaded.model, Place(**entry), size, settings["scale"])
        for head in settings["heads"]:
            modules.keep_head(loaded.model, head)
        modules.put_tensors(loaded.model, load_file(folder / WEIGHTS))
        return loaded.model

    def opening(self, loaded: Loaded) -> list[str]:
        return [line for line in LINES.format(**PARALLEL if self._scale else BEHIND).splitlines() if line.strip()]


# The same arithmetic as models/bottleneck_modules.py, in lines that stand alone.
LINES = """
import collections, functools, json, torch
from safetensors.torch import load_file
settings = json.load(open("model/bottleneck_config.json"))
{begin}
def change(site, args, output):
    out = output[0] if isinstance(output, tuple) else output
{source}
    new = out + {scale}site.bottleneck(x.float()).to(out.dtype)
    return (new, *output[1:]) if isinstance(output, tuple) else new
for place in settings["adapters"]:
    site, size = base.get_submodule(place["writes"]), place["size"]
    layer = functools.partial(torch.nn.Conv2d, kernel_size=1) if place["convolution"] else torch.nn.Linear
    parts = {{"down": layer(place["{width}"], size), "gelu": torch.nn.GELU(), "up": layer(size, place["width"])}}
    site.bottleneck = torch.nn.Sequential(collections.OrderedDict(parts))
    site.register_forward_hook(change)
{end}
base.load_state_dict(load_file("model/adapter.safetensors"), strict=False)  # only what was trained is in it
model = base.eval()
"""
BEHIND = {"begin": "", "source": "    x = out", "scale": "", "width": "width", "end": ""}
PARALLEL = {
    "begin": "def read(site, module, args):\n    site.seen = args[0]",
    "source": "    x, site.seen = site.seen, None\n"
    "    if site.bottleneck.down.weight.ndim == 4:  # a picture, thinned where the layer thins it\n"
    "        x = x[:, :, :: -(-x.shape[2] // out.shape[2]), :: -(-x.shape[3] // out.shape[3])]",
    "scale": 'settings["scale"] * ',
    "width": "width_in",
    "end": '    base.get_submodule(place["reads"]).register_forward_pre_hook(functools.partial(read, site))',
}
