"""The promises between the rooms: what a task, a method, a metric and a callback owe the engine.

A Task says what to learn. A Method says which numbers may move. The engine moves them and knows both only by
what stands here. No concrete task, method or model is named in this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

if TYPE_CHECKING:
    from tunewright.recipe import ModelSpec

Record = dict[str, Any]  # one row of the user's data: the task's fields, "row" (its id) and "extra" (other columns)
Example = dict[str, Any]  # one record turned into tensors, not yet padded; key "row" is the row id, other plain values
#                           (label, length) reach no frozen part of a model
Batch = dict[str, Any]  # tensors whose first axis is B, or lists of length B (boxes, row ids)
Prediction = dict[str, Any]  # plain Python values, ready for JSON


# ------------------------------------------------------------------ small words
@dataclass(frozen=True)
class Baseline:
    """What stands for "before" where the base has no head of its own: its name, how it was made, and its answers."""

    name: str
    text: str
    predict: Callable[[Sequence[Record]], list[Prediction]]


@dataclass(frozen=True)
class Field:
    """A column that a task reads.

    kind: how it is checked and read; a name in data/inspection.py ("text", "label", "image", "conversation"). A kind
        that is made of several columns says so in data/columns.py.
    aliases: other names under which people keep it; a guess from them is always reported.
    """

    help: str
    kind: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One number about predictions. Scored per row, so that base and tuned can be compared in pairs.

    pool: combines per-row values that do not average (for F1: pairs of label and prediction); None: the mean.
    proportion: a right/wrong share, shown in points of a hundred.
    """

    name: str
    higher_is_better: bool = True
    proportion: bool = True
    pool: Callable[[Sequence[Any]], float] | None = None

    def overall(self, rows: Sequence[Any]) -> float:
        """The metric over rows; rows as `Task.score` gave them under this name."""
        return self.pool(rows) if self.pool else sum(rows) / len(rows)


@dataclass(frozen=True)
class Loss:
    """What one forward pass costs, summed and not yet averaged.

    totals: by term, () float32, a sum over counted items, still attached to the graph. A coefficient is multiplied
            in by the task.
    logs:   detached scalars worth a line in the log, already means.

    The engine divides each term by the weight of the *whole* step (`Task.weights`, summed over all micro-batches and
    ranks before the first backward), so a gradient never depends on how the step was cut up.
    """

    totals: dict[str, Tensor]
    logs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Where the parts of one model live, as dotted module names.

    Methods look at this and never at a model's class, so one method file serves a text decoder, a vision encoder and
    a speech model alike.
    """

    blocks: tuple[str, ...]  # shallow to deep; may come from several lists (encoder, decoder; stages)
    embedding: str | None  # None for models without a lookup table
    head: str | None
    attention: tuple[str, ...] = ()  # the matrix products inside blocks that make attention; () in a convolutional net
    mlp: tuple[str, ...] = ()  # all other matrix products inside blocks


@dataclass
class Loaded:
    """A model with the things that must travel with it.

    model:     the one module that is trained.
    processor: tokenizer, image processor or feature extractor; saved with the run.
    labels:    the label names in order of their ids, or () where the task has none.
    fresh:     names of modules the checkpoint did not supply (a new head). They are random, so every method trains
               and saves them. Names, not parameters: peft copies modules, FSDP2 replaces parameters.
    helpers:   frozen things the task needs beside the model (a VAE, a reward model).
    origin:    checkpoint, revision and SHA-256 of the base's weights: an adapter belongs to one base.
    notes:     what was chosen automatically while loading, each with its reason.
    """

    model: nn.Module
    processor: Any
    layout: Layout
    labels: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    helpers: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Reference = Callable[[], AbstractContextManager[nn.Module]]


# ------------------------------------------------------------------------- Task
@dataclass(frozen=True)
class Task(ABC):
    """What is learned: how a record becomes tensors, a loss, a prediction and a score.

    A subclass is a frozen dataclass whose fields are its options, so printing a task shows its settings and two equal
    tasks are the same task. It holds no model and no data. Learnt state belongs to the model; counters to the engine.
    """

    fields: ClassVar[dict[str, Field]]
    metrics: ClassVar[tuple[Metric, ...]]  # the first one decides: early stopping, verdict
    auto_class: ClassVar[str] = ""  # the transformers class that opens a saved model: "AutoModelFor..."
    pipeline: ClassVar[str] = ""  # the hub's pipeline tag, "" where there is none
    needs_reference: ClassVar[bool] = False  # True: `prepare` will ask for the start policy
    dropout: ClassVar[bool] = True  # False: every dropout is off, functional ones too (DPO)
    couples_rows: ClassVar[bool] = False  # True: rows of a batch see each other (contrastive); the cut then matters
    # True: a training example is one sequence, "input_ids" and "labels" (T,), whose loss goes through causal_logprob
    # alone; the engine may then lay several end to end. Its loss and weights read no other key of the batch.
    packs: ClassVar[bool] = False

    @abstractmethod
    def load(self, spec: ModelSpec, labels: Sequence[str] = ()) -> Loaded:
        """Load the checkpoint in the shape this task needs.

        `labels` are the label names of the training rows, () for tasks without, or when a saved run is opened that
        knows its own. Raises ModelError if the checkpoint has no such shape (a decoder for detection).
        """

    def rows(self, loaded: Loaded, records: Sequence[Record]) -> Sequence[Record]:
        """Rows to train on, made once before encoding (prior images, replay). Default: as given.

        May leave rows out that cannot be learnt from, and says in `loaded.notes` why, how many and which; data.json and
        `check` list them under "left_out". A row made from a record keeps its "where".
        """
        return records

    def fit_to(self, records: Sequence[Record]) -> Task:
        """This task with what it must read off the training rows (class weights); must not look at test rows.

        Called before a model is loaded. Raises RecipeError if an option does not fit these rows.
        """
        return self

    @abstractmethod
    def encode(self, record: Record, loaded: Loaded, *, target: bool = True) -> Example:
        """One record to tensors. Pure: same record, same example. `target=False` stops before the answer.

        Raises DataError naming the field that is missing or of the wrong kind. May set "truncated": the number of
        items (tokens) that did not fit, which `check` counts and shows.
        """

    def show(self, example: Example, loaded: Loaded) -> str:
        """An example turned back into what a person can read: what the model will really see, and the target."""
        return str({key: value for key, value in example.items() if not isinstance(value, Tensor)})

    def augment(self, example: Example, rng: Generator) -> Example:
        """Training only. `rng` is keyed by (seed, epoch, row): resume, workers and ranks change nothing."""
        return example

    @property
    def augments(self) -> bool:
        """Whether `augment` changes rows under these options: no two passes then see the same input."""
        return type(self).augment is not Task.augment

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack examples; pad to the longest. Padding carries label -100."""

    def prepare(
        self, policy: nn.Module, reference: Reference, step: list[Batch], loaded: Loaded, rng: Generator
    ) -> list[list[Batch]]:
        """The micro-batches drawn for one step -> the optimiser steps to take with them.

        Default: [step]. Preference tasks add reference log-probabilities here; tasks that learn from their own samples
        generate, score and return several steps, equally many on every rank. Noise (diffusion, masked tokens) is drawn
        here, per row. Called under `torch.no_grad()`.
        """
        return [step]

    @abstractmethod
    def weights(self, batch: Batch) -> dict[str, float]:
        """How many items each term of the loss counts in this micro-batch (tokens, images, boxes); no forward."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, loaded: Loaded) -> Loss:
        """The cost of one micro-batch. May call the model any number of times."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Prediction]:
        """One prediction per row of the batch, in order; used by evaluate and by serve.

        Where the batch carries targets (evaluation), a prediction may hold what they cost under the model.
        """

    def validate(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Prediction]:
        """`predict` as far as the periodic evaluation needs it; tasks for which answering is slow do less here."""
        return self.predict(model, batch, loaded)

    def truth(self, record: Record) -> str | None:
        """The right answer in words, for the table of flips."""
        return record.get("label")

    @abstractmethod
    def score(self, prediction: Prediction, record: Record) -> dict[str, Any]:
        """Metrics of one row, by bare name: a number, or what the metric's `pool` combines."""

    def baseline(self, spec: ModelSpec, loaded: Loaded, records: Sequence[Record]) -> Baseline | None:
        """What stands for "before" when the base has no head (zero-shot, majority). None: the base itself.

        `records` are training rows: what must be chosen is chosen on them.
        """
        return None


# ----------------------------------------------------------------------- Method
@dataclass(frozen=True)
class Method(ABC):
    """Which parameters move, and what of them is worth saving.

    Same shape rule for every method: after `apply`, the model is called the same way and returns outputs of the same
    shape as before, `.generate` included. That rule is what keeps tasks ignorant of methods; the contract tests check
    it for every file in `methods/`.
    """

    learning_rate: ClassVar[float]  # the recommendation where the recipe names none
    learning_rate_reason: ClassVar[str]
    standalone: ClassVar[bool]  # True: `save` writes a whole model that needs no base to be opened
    folds: ClassVar[bool] = True  # False: the change cannot be folded into the weights, `merge` raises
    additive: ClassVar[bool] = True  # False: the untrained start already answers otherwise than the base (prompts)
    packs: ClassVar[bool] = True  # False: what it puts before a sequence would stand before several packed ones
    imports: ClassVar[tuple[str, ...]] = ()  # large libraries that `apply` needs; imported before the base is opened

    @property
    @abstractmethod
    def keeps_base(self) -> bool:
        """True: the base stays intact inside, no second copy is needed (LoRA yes, full no)."""

    def recommended(self) -> tuple[float, str]:
        """The learning rate for these options, and why."""
        return self.learning_rate, self.learning_rate_reason

    def remarks(self) -> list[str]:
        """What a person should know about these options before training, in sentences."""
        return []

    def reserve(self, loaded: Loaded) -> None:  # noqa: B027
        """Before any row is read: take from the room of a sequence what the method itself will put into it."""

    @abstractmethod
    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        """Freeze, insert or wrap; keep `loaded.fresh` trainable; return the module to train.

        What trains is float32 afterwards. Raises MethodError listing the names that `targets` matched nothing in.
        """

    def start(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> str | None:
        """Before the first step: initialise from data (EVA, sparse mask) or solve in closed form (head).

        batches: every row once, in the order of the data, each to be looked at in eval mode before the next is taken.
        Frozen blocks below all that trains may be left out meanwhile, as they are in training: nobody may hook them.
        A sentence that says how it was solved: there is nothing left to step. None: go on with steps.
        """
        return None

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Optimiser groups of (name, parameter) pairs. Default: decay on matrices, none on norms and biases.

        A group may carry "since", the progress in [0, 1) at which it began to train: its rate is warmed up from there.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [(n, p) for n, p in named if p.ndim > 1], "lr": learning_rate, "weight_decay": weight_decay},
            {"params": [(n, p) for n, p in named if p.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
        ]

    def advance(self, model: nn.Module, loaded: Loaded, progress: float) -> bool:
        """Called between steps with progress in [0, 1]; True if the trainable set changed.

        A pure function of progress: resume replays it before the optimiser state (keyed by parameter name) is loaded.
        """
        return False

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Added to the step once (anchored decay, EWC, FedProx)."""
        return None

    def after_step(self, model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:  # noqa: B027
        """Put back what must not have moved (masks), or pull it back (anchors).

        groups: the optimiser's, with the rate of this step under "lr" and names under "param_names".
        """

    def reference(self, model: nn.Module, start: nn.Module | None) -> AbstractContextManager[nn.Module]:
        """The model as it was before training, for the length of a `with` block.

        Methods that keep the base switch their additions off; the others return `start`, the frozen copy that the
        engine made because `keeps_base` is False.
        """
        return nullcontext(start if start is not None else model)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The smallest set of tensors, by name in the model, from which `apply` + load gives this model again."""
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def restore(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave, before the optimiser is built. A name that is not there raises KeyError."""
        places = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, value in tensors.items():
                places[name].copy_(value)

    @abstractmethod
    def merge(self, model: nn.Module) -> nn.Module:
        """The plain model with the change folded in, for export; `model` stays as it is.

        Raises MethodError if the method cannot be folded (prefixes, prompts).
        """

    @abstractmethod
    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        """Write `model/` in the format the ecosystem reads (PEFT adapter, or transformers / diffusers model)."""

    def open(self, loaded: Loaded, folder: Path) -> nn.Module:
        """What `save` wrote, on its base again. Only asked where `standalone` is False."""
        raise NotImplementedError

    def opening(self, loaded: Loaded) -> list[str]:
        """Lines of Python that turn `base` into the tuned `model`, with libraries of the field and none of ours.

        They run beside the folder `model/`, stand in the model card, and are run by tests. Only asked where
        `standalone` is False.
        """
        return ["from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "model").eval()']


# ---------------------------------------------------------------------- Callback
@dataclass
class State:
    """Where training stands; what a checkpoint needs beside the tensors."""

    step: int = 0  # optimiser steps taken
    total: int = 0  # optimiser steps planned
    epoch: float = 0.0
    seen: float = 0.0  # items, in the unit of Task.weights
    best: float | None = None  # of the first metric, on validation
    best_step: int | None = None
    stale: int = 0  # evaluations since the best
    judged: int = 0  # the step of the last evaluation
    pieces: int = 1  # into how many a micro-batch is cut because memory did not reach for a whole one
    seconds: float = 0.0  # spent in steps, over all starts of this run
    stop: str | None = None  # a reason to end the run


class Callback:
    """Watches a run. Five moments, each a no-op until overridden.

    It reads `State` and may set `state.stop`. It never steps, never changes the loss: what changes learning is a task
    or a method.
    """

    def on_start(self, state: State, model: nn.Module) -> None: ...
    def on_step(self, state: State, logs: dict[str, float]) -> None: ...
    def on_evaluate(self, state: State, scores: dict[str, float]) -> None: ...
    def on_end(self, state: State, model: nn.Module) -> None: ...
    def on_error(self, state: State, error: BaseException) -> None: ...


Precision = Literal["float32", "bf16"]
Device = torch.device
