"""Sparse fine-tuning: a fixed small part of the weights trains in place, chosen once by the size of its gradient.

Use it when the result must be the base itself but for one weight in twenty, with no change of architecture and no
adapter; for a mixture of experts with `experts: 0.2`, which trains only the experts that the task's tokens use most.

w = w0 + m * d with a mask m that never changes. By gradient: as FISH masks, arXiv 2111.09839, with |g| for g^2; at
random: SHiRA, arXiv 2406.13175; experts by their share of tokens: ESFT-Token, arXiv 2407.01906. Knows Layout and
masks, never a model class.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Method, Task
from tunewright.data.batches import sample
from tunewright.errors import Fault, MethodError
from tunewright.models import masks
from tunewright.models.layout import within
from tunewright.models.places import own_head
from tunewright.models.surgery import freeze


@dataclass(frozen=True)
class Sparse(Method):
    # share of the chosen matrices' weights that train, above 0 up to 1; papers take 0.005 to 0.02 of large models, but
    # on 100 sentences with a small encoder 0.01, 0.02 and 0.05 reached 64.6, 68.0 and 70.4 % (LoRA: 71.4)
    density: float = 0.05
    selection: Literal["gradient", "random", "magnitude"] = "gradient"  # what the trained weights have most of
    scope: Literal["global", "tensor"] = "global"  # the share of all matrices together, or of each
    batches: int = 64  # training batches, spread over the rows, that the gradient or the experts are read from
    target_modules: str | tuple[str, ...] = "all-linear"  # or last name segments: [query, value]; tables by name only
    # mixtures of experts: in each layer the fewest experts that take this share of tokens train, whole, and nothing
    # else; 0.2 as in ESFT, 1.0 for all that are used
    experts: float | None = None

    learning_rate: ClassVar[float] = 5e-4
    learning_rate_reason: ClassVar[str] = (
        "between 3e-4, best on photographs (90 % right; 86 at 1e-3), and 1e-3, best on 1,000 sentences (83.4; 82.2)"
    )
    standalone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}: a share above 0, up to 1")
        if self.batches < 1:
            raise ValueError(f"batches is {self.batches}: 1 or more")
        if self.experts is not None and not 0 < self.experts <= 1:
            raise ValueError(f"experts is {self.experts}: a share of tokens above 0, up to 1, or nothing")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(f'target_modules is "{self.target_modules}": "all-linear" or a list of names')

    def remarks(self) -> list[str]:
        memory = (
            "The optimiser keeps states for the chosen weights alone; in a step an adapted matrix exists twice, "
            "and its whole gradient for a moment."
        )
        if self.experts is None:
            return [memory]
        return [memory, "The chosen experts train whole: density, selection, scope and target_modules play no part."]

    @property
    def keeps_base(self) -> bool:
        return True

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        """Freeze; additions of zero at the mask, which by gradient or by tokens is a stand-in until `start`."""
        freeze(model)
        own = own_head(model, loaded)
        if self.experts is not None:
            for owner in self._experts(model):
                count = masks.num_experts(model.get_submodule(owner))
                self._add_experts(model, owner, torch.arange(math.ceil(self.experts * count)))
        else:
            weights = {place: model.get_parameter(place).detach() for place in self._places(model, loaded)}
            by_size = self.selection == "magnitude"
            scores = {n: w.abs().float() if by_size else torch.rand(w.shape) for n, w in weights.items()}
            self._add_at_highest(model, scores)
        for place in [name for name, _ in model.named_parameters() if within(name, own)]:
            masks.add(model, place)
        return model

    def _places(self, model: nn.Module, loaded: Loaded) -> list[str]:
        """Names of the weights that the mask may choose from, in a model without additions to them."""
        own = own_head(model, loaded)
        if isinstance(self.target_modules, str):
            head = (loaded.layout.head,) if loaded.layout.head else ()
            return _unpacked(model, masks.products(model, (*own, *head)))
        chosen: list[str] = []
        lost, there = [], masks.matrices(model, own)
        for target in self.target_modules:
            hit = [place for place in there if f".{place.rpartition('.')[0]}".endswith(f".{target}")]
            chosen += [place for place in hit if place not in chosen]
            lost += [target] * (not hit)
        if lost:
            segments = sorted({place.split(".")[-2] for place in there if "." in place})
            problem = f"{lost} match no module with a matrix of its own"
            expected = "some of " + ", ".join(segments)
            raise MethodError(Fault(problem, where="method.target_modules", expected=expected))
        return _unpacked(model, chosen)

    def _experts(self, model: nn.Module) -> dict[str, list[str]]:
        if found := masks.expert_modules(model):
            return found
        remedy = "Leave experts out: the mask then covers all matrices. Or use method=lora."
        raise MethodError(Fault("this model is no mixture of experts", where="method.experts", remedy=remedy))

    def _add_at_highest(self, model: nn.Module, scores: dict[str, Tensor]) -> None:
        for place, index in masks.highest(scores, self.density, self.scope).items():
            masks.add(model, place, index)

    def _add_experts(self, model: nn.Module, owner: str, index: Tensor) -> None:
        for place in self._experts(model)[owner]:
            masks.add(model, place, index, slices=True)

    # ------------------------------------------------------------------ the mask
    def start(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> str | None:
        if self.experts is None and self.selection != "gradient":
            return None
        own = own_head(model, loaded)
        for place in [place for place in masks.additions(model) if not within(place, own)]:
            masks.remove(model, place)
        model.eval()  # dropout would put noise into what is chosen for good
        costs = self._costs(model, task, loaded, sample(batches, self.batches))
        if self.experts is None:
            self._add_at_highest(model, masks.absolute_gradients(model, self._places(model, loaded), costs))
            return None
        with torch.no_grad(), masks.counted_tokens(model) as counts:
            for _ in costs:
                pass
        for owner, count in counts.items():
            if not count.sum():
                problem = f"{owner} is not told which experts a token goes to, so they cannot be chosen"
                remedy = "Leave experts out: the mask then covers all matrices. Or use method=lora."
                raise MethodError(Fault(problem, where="method.experts", remedy=remedy))
        for owner, count in counts.items():
            self._add_experts(model, owner, masks.most_used(count, self.experts))
        return None

    def _costs(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """The mean cost of each batch, as the loop would step on it, one at a time."""
        device = next(model.parameters()).device
        rng = torch.Generator().manual_seed(0)
        for batch in batches:
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            with torch.no_grad():
                steps = task.prepare(model, lambda: self.reference(model, None), [moved], loaded, rng)
            for micro in [micro for step in steps for micro in step]:
                counts = task.weights(micro)
                if min(counts.values()) > 0:
                    totals = task.loss(model, micro, loaded).totals
                    yield torch.stack([total.float() / counts[term] for term, total in totals.items()]).sum()

    # ------------------------------------------------------------ training, keeping
    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """No decay: what trains is the difference from the base, so decay would only pull back to it."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [{"params": named, "lr": learning_rate, "weight_decay": 0.0}]

    def reference(self, model: nn.Module, start: nn.Module | None) -> AbstractContextManager[nn.Module]:
        return masks.switched_off(model)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained numbers, and where they belong: `start` is not asked again when a run goes on."""
        places = {name: buffer for name, buffer in model.named_buffers() if masks.place_of(name)}
        return super().state(model) | places

    def restore(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        saved: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if found := masks.place_of(name):
                saved.setdefault(found, {})[name.rpartition(".")[2]] = tensor
        for place in masks.additions(model).keys() - saved.keys():
            masks.remove(model, place)
        for place, parts in saved.items():
            masks.put(model, place, **parts)
        super().restore(model, {name: tensor for name, tensor in tensors.items() if not masks.place_of(name)})

    def merge(self, model: nn.Module) -> nn.Module:
        """Folded in float32: a base in bf16 would round most of the additions away."""
        merged = copy.deepcopy(model).float()
        for place in masks.additions(merged):
            masks.remove(merged, place, folded=True)
        return merged

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        """The merged model: there is no adapter format for single weights that plain transformers would open."""
        self.merge(model).save_pretrained(folder)  # type: ignore[operator]
        loaded.processor.save_pretrained(folder)


def _unpacked(model: nn.Module, places: list[str]) -> list[str]:
    packed = [place for place in places if not model.get_parameter(place).is_floating_point()]
    if packed:
        problem = f"{len(packed)} weights are quantised: a single one of them cannot change"
        remedy = "Leave model.quantize out, or use method=lora."
        raise MethodError(Fault(problem, where="method sparse", got=packed[0], remedy=remedy))
    if not places:
        remedy = "Use method=full or method=head."
        raise MethodError(
            Fault("this model has no matrix to choose weights from", where="method sparse", remedy=remedy)
        )
    return places
