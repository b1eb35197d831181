"""The frozen part of a model: where it ends, what it is made of, how it is run alone and how it is left out.

Knows blocks by name and order, and the loss only as a way to call the model; every model is asked whether it bears it.
Keeps no activations: see trunk_cache.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Precision, Task
from tunewright.engine import memory
from tunewright.engine.distributed import to_device
from tunewright.engine.precision import compute_in
from tunewright.models.surgery import set_mode

NOTHING = "nothing is to be gained"
FINE: dict[Precision, float] = {"float32": 1e-5, "bf16": 2e-2}  # how far the loss may move, relative


class Trunk:
    """The blocks below everything that trains, as `find` saw them last; `below` is empty where there are none."""

    def __init__(self, task: Task, loaded: Loaded, device: torch.device, precision: Precision) -> None:
        self._task, self._loaded = task, loaded
        self._device, self.precision = device, precision
        self.below: list[nn.Module] = []
        self._inside: list[nn.Module] = []
        self._called: dict[nn.Module, int] = {}  # how many blocks were done when a module was called first
        self._digests: dict[nn.Module, bytes] = {}  # of weights, see fingerprint
        self._beside = -1  # how many Nones blocks give beside the activation; -1: it comes bare, in no tuple

    # ------------------------------------------------------------------- finding
    def find(self, model: nn.Module, batch: Batch) -> str:
        """Look where the boundary is, by watching one batch; a reason where there is none."""
        self.below, self._digests = [], {}
        inside = list(model.modules())
        blocks = [self._loaded.model.get_submodule(name) for name in self._loaded.layout.blocks]
        if not all(any(block is module for module in inside) for block in blocks):
            return "its blocks were put into others"
        self.cost(model, batch)  # whatever asks a model something once does it now, unwatched
        done: list[nn.Module] = []
        began: list[int] = []  # how many blocks were done when something that trains was called
        called: dict[nn.Module, int] = {}  # how many were done when it was called first
        trains = {m for m in inside if any(p.requires_grad for p in m.parameters(recurse=False))}

        def calls(module: nn.Module, args: Any) -> None:
            called.setdefault(module, len(done))
            if module in trains:
                began.append(len(done))

        handles = [m.register_forward_pre_hook(calls) for m in inside]
        handles += [b.register_forward_hook(lambda module, args, output: done.append(module)) for b in blocks]
        try:
            self.cost(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        below = blocks[: min(began, default=0)]
        if any(p.requires_grad for block in below for p in block.parameters()):
            return "parts that train are not called by themselves"
        if done != blocks:
            return "its blocks are not called one after the other, once each"
        self.below, self._inside, self._called = below, inside, called
        return "" if below else NOTHING

    def is_noisy(self, model: nn.Module, batch: Batch) -> bool:
        """Whether the trunk, as it stands while the rest trains, gives other numbers by chance.

        A dropout with nothing of its own to train follows the module around it, which may train higher up (GPT-2).
        """
        set_mode(model, dropout=self._task.dropout)
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                found.append(self.run(model, batch))
        model.eval()
        return found[0] is not None and found[1] is not None and not torch.equal(found[0], found[1])

    # ------------------------------------------------------------------- running
    def cost(self, model: nn.Module, batch: Batch) -> float:
        with compute_in(self.precision, self._device):
            loss = self._task.loss(model, to_device(batch, self._device), self._loaded)
        return float(sum(value.float() for value in loss.totals.values()))

    def run(self, model: nn.Module, batch: Batch, lower: Tensor | None = None, count: int = 0) -> Tensor | None:
        """What the highest frozen block gives, (B, ...); what stands above it is not run. None: no single tensor.

        lower: what the first `count` blocks give, where that is known: they are not run either.
        """
        given: list[Any] = []

        def enough(module: nn.Module, args: Any, output: Any) -> None:
            given.append(output)
            raise _Enough

        handle = self.below[-1].register_forward_hook(enough)
        known = contextlib.nullcontext() if lower is None else self.left_out(lower, count)
        try:
            with contextlib.suppress(_Enough), known:
                self.cost(model, batch)
        finally:
            handle.remove()
        output = given[0]
        self._beside = -1 if isinstance(output, Tensor) else len(output) - 1
        tensor = _only_tensor(output)
        return tensor if tensor is not None and len(tensor) == memory.rows_of(batch) else None

    def bears(self, model: nn.Module, batch: Batch, given: Tensor) -> str:
        """A reason why this model does not give the same loss when the trunk is left out."""
        plain = self.cost(model, batch)
        with self.left_out(given):
            moved = abs(plain - self.cost(model, batch))
        fine = moved <= FINE[self.precision] * max(abs(plain), 1.0)
        return "" if fine else f"this model bears no kept activations (its loss moved by {moved:.2g})"

    @contextlib.contextmanager
    def left_out(self, given: Tensor, count: int | None = None) -> Iterator[None]:
        """Inside, the frozen blocks (the first `count` of them) do nothing and the highest of those gives this."""
        *idle, last = self.below[:count]
        given = given.to(self._device)
        for block in idle:
            block.forward = lambda hidden, *args, **named: self._shaped(hidden)
        last.forward = lambda *args, **named: self._shaped(given)
        try:
            yield
        finally:
            for block in (*idle, last):
                del block.forward

    def _shaped(self, hidden: Tensor) -> Any:
        return hidden if self._beside < 0 else (hidden, *[None] * self._beside)

    # -------------------------------------------------------------------- naming
    def about(self) -> dict[str, Any]:
        """What the trunk is, for people."""
        blocks = f"{len(self.below)} of {len(self._loaded.layout.blocks)}"
        return {"model": self._loaded.origin.get("checkpoint", ""), "blocks": blocks, "precision": self.precision}

    def fingerprint(self, count: int | None = None) -> str:
        """All that makes two activations of one row the same: weights, place, arithmetic, versions.

        count: above so many blocks; None: at the boundary. Weights are hashed as they stand here and not as the
        checkpoint had them: words may have been added to the table, or blocks trained and frozen again.
        """
        import transformers

        model, below = self._loaded.model, self.below[:count]
        names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
        weights = [f"{names.get(m, '')} {self._digest(m).hex()}" for m in self._at_or_before(len(below))]
        parts = {
            "weights": weights, "base": self._loaded.origin.get("sha256", ""),
            "model": type(model).__name__, "settings": _settings(model), "task": type(self._task).__name__,
            "place": names[below[-1]],
            "precision": self.precision, "device": self._device.type, "processor": _processor(self._device),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _at_or_before(self, count: int) -> list[nn.Module]:
        """What may play a part in what so many blocks give: all but what is called later or lies in later blocks.

        What is never called by itself (the products inside torch's own attention) counts.
        """
        blocks = [self._loaded.model.get_submodule(name) for name in self._loaded.layout.blocks[count:]]
        late = {m for block in blocks for m in block.modules()}
        return [m for m in self._inside if m not in late and self._called.get(m, 0) < count]

    def _digest(self, module: nn.Module) -> bytes:
        """Of the frozen weights and the buffers that are the module's own."""
        if module not in self._digests:
            digest = hashlib.sha256()
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, value in own:
                if not value.requires_grad:
                    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(bytes_of(value))
            self._digests[module] = digest.digest()
        return self._digests[module]


class _Enough(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _settings(model: nn.Module) -> dict[str, Any]:
    """The model's configuration without what people call its outputs, which no block reads."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    names = ("id2label", "label2id", "num_labels", "problem_type", "_name_or_path")
    kind = getattr(config, "_attn_implementation", "")
    return {key: value for key, value in settings.items() if key not in names} | {"attention": kind}


def _processor(device: torch.device) -> str:
    """What computes: another one may round otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {name} {torch.backends.cpu.get_cpu_capability()}"


def bytes_of(value: Tensor) -> Any:
    """The tensor's memory, for a hash."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _only_tensor(output: Any) -> Tensor | None:
    """What a block hands on, if that is one tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and isinstance(output[0], Tensor) and all(part is None for part in output[1:]):
        return output[0]
    return None
