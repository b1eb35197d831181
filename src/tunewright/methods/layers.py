"""Layer by layer: which layers train, how fast each one, and from when on. Unfreezing, layer decay, LP-FT, BitFit.

Use it when a whole model should move, but gently: lower layers slower (discriminative), later (gradual-unfreezing) or
not at all (last: 2, bitfit); lp-ft where the model will meet other inputs than those of the training rows.

Rates by depth and unfreezing: Howard and Ruder 2018, arXiv 1801.06146; LP-FT: Kumar et al. 2022, arXiv 2202.10054;
biases: Ben Zaken et al. 2021, arXiv 2106.10199; first or last blocks: Lee et al. 2022, arXiv 2210.11466.
What stands outside the blocks goes with the block before it (final norm, pooler), or below the first one (embeddings,
stem), in the order in which the model holds its parts; what it computes first is not looked at. Knows Layout, never a
model class.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Method, Task
from tunewright.errors import Fault, MethodError
from tunewright.models.layout import speaks_words, within
from tunewright.models.probe import solve_head
from tunewright.models.surgery import train_in_float32

DECAY, RATIO, HEAD_SHARE = 0.8, 10.0, 0.2  # what None and true stand for below
SOLVED = "head_first.solved"  # in a checkpoint: the head was solved, so that everything has trained from the start
KINDS = ("attention", "mlp", "norms", "biases")


class Part(NamedTuple):
    """When one parameter trains, and how fast."""

    since: float  # progress in [0, 1)
    factor: float  # its rate, in rates of the recipe
    new: bool = False  # in a new head


# What was planned for a model, until it is gone. Beside the model: copies and saved files know nothing of it.
_PLANS: WeakKeyDictionary[nn.Module, dict[str, Part]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Layers(Method):
    last: int | None = None  # the last k blocks, with what follows them
    first: int | None = None  # the first k blocks, with what stands below them
    only: Literal["attention", "mlp", "norms", "biases"] | None = None  # matrix products in blocks; norms; biases
    match: str | tuple[str, ...] | None = None  # regular expressions, found anywhere in a parameter's name
    # rate of a block / rate of the one above; 0.385 is ULMFiT's 1/2.6. None: 0.8 where whole layers train, 1 (the same
    # rate for all, as published) with only, match or head_first
    layer_decay: float | None = None
    # rate of a new head / rate of the top; None: 10, and 1 for a head that was solved. With only: biases too: 10 gained
    # 9 to 17 points on 100 rows where 1 gained 5 to 8 (SST-2, MiniLM, 117 steps, 3 seeds)
    head_learning_rate_ratio: float | None = None
    unfreeze: float | None = None  # share of training by which everything has been unfrozen, from the top down
    # LP-FT: the head is solved before all train; where it cannot be, it is stepped alone for this share (true: 0.2)
    head_first: bool | float = False

    learning_rate: ClassVar[float] = 1e-4
    learning_rate_reason: ClassVar[str] = "where lower layers move less, the top stands twice the rate of full tuning"
    standalone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, count in (("last", self.last), ("first", self.first)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}: a number of blocks, 1 or more")
        for pattern in self._patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f'match "{pattern}" is no regular expression: {error}') from error
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}: above 0, up to 1 (1: the same rate for all)")
        if self.head_learning_rate_ratio is not None and not self.head_learning_rate_ratio > 0:
            raise ValueError(f"head_learning_rate_ratio is {self.head_learning_rate_ratio}: above 0")
        if self.unfreeze is not None and not 0 < self.unfreeze < 1:
            raise ValueError(f"unfreeze is {self.unfreeze}: a share of training, above 0 and below 1")
        if not 0 <= self._head_share < 1:
            raise ValueError(f"head_first is {self.head_first}: true, or a share of training below 1")
        if self.unfreeze and self.head_first:
            raise ValueError("unfreeze and head_first are two schedules: unfreeze already begins with the head alone")

    @property
    def keeps_base(self) -> bool:
        return False

    # ------------------------------------------------------- what the options mean
    @property
    def _patterns(self) -> tuple[str, ...]:
        return (self.match,) if isinstance(self.match, str) else self.match or ()

    @property
    def _head_share(self) -> float:
        return HEAD_SHARE if self.head_first is True else float(self.head_first)

    @property
    def _decay(self) -> float:
        if self.layer_decay is not None:
            return self.layer_decay
        return 1.0 if self.only or self._patterns or self.head_first else DECAY

    def _ratio(self, *, solved: bool) -> float:
        if self.head_learning_rate_ratio is not None:
            return self.head_learning_rate_ratio
        return 1.0 if solved else RATIO

    def recommended(self) -> tuple[float, str]:
        if self.only in ("norms", "biases"):
            return 3e-3, "so few numbers must move far: biases alone learnt better at 3e-3 than at 1e-3"
        if self.last or self.first or self.only or self._patterns:
            return 3e-4, "a part of the layers must move further than all of them do together: 1e-4 to 1e-3"
        if self.head_first:
            return 1e-4, "small, so that the head stays near its optimum; 1e-4 and 3e-4 did better than 3e-5"
        return self.learning_rate, self.learning_rate_reason

    def remarks(self) -> list[str]:
        said = []
        if self._decay < 1:
            said.append(f"Learning rates fall from the top layer down, by {self._decay:g} a block.")
        if self.unfreeze:
            said.append(
                f"The head trains first; layers are unfrozen from the top down until all train, at "
                f"{self.unfreeze:.0%} of the steps."
            )
        if self.unfreeze and self.unfreeze > 0.5:
            said.append(
                "That is late: over nearly the whole run, and at ULMFiT's decay, unfreezing lost 8 points on 100 "
                "questions; done by 30 % it lost nothing. Consider unfreeze: 0.3."
            )
        if self.head_first:
            said.append(
                "LP-FT pays where inputs will differ from the training rows. On few rows of the same kind it can lose "
                "to method=full: a head that is right already gives the layers below little to learn from."
            )
        return said

    # ------------------------------------------------------------------- the plan
    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        plan = self._plan(model, loaded)
        _PLANS[model] = plan
        _let_train(model, set(plan))
        train_in_float32(model)  # also what trains later: a type must not change in the middle of a run
        self.advance(model, loaded, 0.0)
        if late := [part.since for part in plan.values() if part.since > 0]:
            now, all_ = (
                sum(p.numel() for n, p in model.named_parameters() if n in plan and plan[n].since <= since)
                for since in (0.0, max(late))
            )
            loaded.notes.append(f"{now:,} parameters train at the start, {all_:,} after {max(late):.0%} of the steps.")
        return model

    def _plan(self, model: nn.Module, loaded: Loaded) -> dict[str, Part]:
        """Every parameter that will ever train."""
        depth = _depths(model, loaded.layout.blocks)
        own = () if loaded.layout.head is None or speaks_words(model, loaded.layout.head) else (loaded.layout.head,)
        chosen = self._chosen(model, loaded, depth, heads=(*loaded.fresh, *own))
        # names of `match` are taken at their word: a head that is not new trains only if it is among them
        head = {n for n in depth if within(n, loaded.fresh) or (within(n, own) and (n in chosen or not self._patterns))}
        body = {n: depth[n] for n in depth if n in chosen and n not in head}
        if self.head_first and not (head and body):
            problem = "nothing but the head trains here" if head else "no head of its own trains here"
            remedy = f"Use method={'head' if head else 'full or lora'}, or leave head_first out."
            raise MethodError(Fault(problem, where="method.head_first", remedy=remedy))
        top = max(body.values(), default=0)
        # the head, then one depth after another; without a head the top begins
        stages = [None] * bool(head) + sorted(set(body.values()), reverse=True)
        ratio = self._ratio(solved=False)
        plan = {n: Part(0.0, ratio, new=True) if within(n, loaded.fresh) else Part(0.0, 1.0) for n in head}
        for name, level in body.items():
            since = self._head_share
            if self.unfreeze and len(stages) > 1:
                since = self.unfreeze * (stages.index(level) / (len(stages) - 1))
            plan[name] = Part(since, self._decay ** (top - level))
        return plan

    def _chosen(self, model: nn.Module, loaded: Loaded, depth: dict[str, int], heads: tuple[str, ...]) -> set[str]:
        """The names that all given selections have in common. Raises MethodError where one of them finds nothing."""
        num = len(loaded.layout.blocks)
        for option, count in (("last", self.last), ("first", self.first)):
            if count is not None and count > num:
                problem, remedy = f"this model has {num} blocks", "Or choose by match; or use method=lora or full."
                expected = f"at most {num}" if num else ""
                raise MethodError(Fault(problem, f"method.{option}", "", expected, str(count), remedy))
        chosen = set(depth)
        if self.last or self.first:
            words = loaded.layout.head if loaded.layout.head and not within(loaded.layout.head, heads) else None
            low, high = num - (self.last or num + 1), self.first or num
            # a vocabulary's output layer belongs to the language, not to its last blocks
            chosen = {n for n in chosen if low < depth[n] <= high and not (words and within(n, (words,)))}
        if self.only:
            found = {kind: _of_kind(model, loaded, kind) for kind in KINDS}
            if all(within(n, heads) for n in found[self.only]):
                there = [kind for kind in KINDS if not all(within(n, heads) for n in found[kind])]
                expected = "one of " + ", ".join(there) if there else ""
                remedy = f"{f'Use only: {there[0]}, or ' if there else 'Use '}method=lora, head or full."
                raise MethodError(Fault(f"this model has no {self.only}", "method.only", "", expected, "", remedy))
            chosen &= found[self.only]
        if self._patterns:
            chosen &= self._matched(model)
        if not chosen:
            options = {name: getattr(self, name) for name in ("last", "first", "only", "match")}
            given = ", ".join(f"{name}: {value}" for name, value in options.items() if value)
            remedy = "Leave one of them out."
            raise MethodError(Fault(f"no parameter fits all of {given}", where="method", remedy=remedy))
        return chosen

    def _matched(self, model: nn.Module) -> set[str]:
        """Names of parameters that an expression finds; a shared weight is found under each of its names."""
        first: dict[Tensor, str] = {}
        names = {n: first.setdefault(p, n) for n, p in model.named_parameters(remove_duplicate=False)}
        hit = {pattern: {own for n, own in names.items() if re.search(pattern, n)} for pattern in self._patterns}
        if lost := [pattern for pattern, found in hit.items() if not found]:
            some = list(names)[:: max(1, len(names) // 8)]
            expected = f"expressions that find names such as {', '.join(some)}"
            raise MethodError(Fault(f"{lost} match no parameter", where="method.match", expected=expected))
        return set().union(*hit.values())

    # ------------------------------------------------------------------- training
    def start(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> str | None:
        if self.head_first and (said := solve_head(model, task, loaded, batches)) is not None:
            loaded.notes.append(f"{said}; from there all train together.")
            self._open(model)
        return None

    def _open(self, model: nn.Module) -> None:
        """With a solved head there is no stage to wait for."""
        ratio = self._ratio(solved=True)
        plan = {n: Part(0.0, ratio if part.new else part.factor, part.new) for n, part in _PLANS[model].items()}
        _PLANS[model] = plan
        _let_train(model, set(plan))

    def advance(self, model: nn.Module, loaded: Loaded, progress: float) -> bool:
        return _let_train(model, {n for n, part in _PLANS[model].items() if part.since <= progress + 1e-9})

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        plan, groups = _PLANS[model], []
        for group in super().groups(model, loaded, learning_rate, weight_decay):
            alike: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
            for name, parameter in group["params"]:
                alike.setdefault(plan[name][:2], []).append((name, parameter))
            for (since, factor), params in alike.items():
                groups.append(group | {"params": params, "lr": learning_rate * factor, "since": since})
        return groups

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All that will ever train: an early checkpoint must also put back what has moved since."""
        plan = _PLANS[model]
        tensors = {name: p.detach() for name, p in model.named_parameters() if name in plan}
        solved = self.head_first and all(part.since == 0 for part in plan.values())
        return tensors | ({SOLVED: torch.ones(())} if solved else {})

    def restore(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        if SOLVED in tensors:
            self._open(model)
        super().restore(model, {name: tensor for name, tensor in tensors.items() if name != SOLVED})

    # -------------------------------------------------------------------- keeping
    def merge(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded.processor.save_pretrained(folder)


# ------------------------------------------------------------------ looking at a model
def _let_train(model: nn.Module, names: set[str]) -> bool:
    """Exactly these train, the rest is frozen; True if that changed anything."""
    changed = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in names):
            parameter.requires_grad_(name in names)
            parameter.grad = None
            changed = True
    return changed


def _depths(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, int]:
    """Each parameter's depth: 0 below the first block, then the number of its block or of the one before it."""
    depths, here = {}, 0
    for name, _ in model.named_parameters():
        here = next((i for i, block in enumerate(blocks, start=1) if within(name, (block,))), here)
        depths[name] = here
    return depths


def _of_kind(model: nn.Module, loaded: Loaded, kind: str) -> set[str]:
    """Names of the parameters of one kind; norms are known by their class, as every library calls them so."""
    named = dict(model.named_parameters())
    if kind == "biases":
        return {n for n, p in named.items() if n.endswith("bias") and p.ndim == 1}
    if kind == "norms":
        norms = [(n, m) for n, m in model.named_modules() if "norm" in type(m).__name__.lower()]
        return {f"{n}.{own}" for n, m in norms for own, p in m.named_parameters(recurse=False) if p.ndim == 1} & set(
            named
        )
    places = loaded.layout.attention if kind == "attention" else loaded.layout.mlp
    return {n for n in named if within(n, places)}
