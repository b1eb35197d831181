"""The one training loop, and the only `.backward()` in the house. Knows tasks and methods only as contracts.

Read `fit` top to bottom: apply -> resume or start -> per draw: prepare -> per step: counts, loss, backward, penalty,
clip, step -> schedule, advance, log, evaluate, save -> the best or the last weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Callback, Loaded, Method, Precision, State, Task
from tunewright.data.batches import Steps, derive_seed
from tunewright.engine import checkpoint, memory, optimizers, schedules
from tunewright.engine.compiling import compile_blocks
from tunewright.engine.distributed import (
    from_first,
    is_first,
    largest,
    same_weights,
    share,
    sum_gradients,
    synchronize,
    to_device,
    total,
)
from tunewright.engine.finite import stop_unless_finite
from tunewright.engine.interruption import Interrupted, leave_if_asked, protected
from tunewright.engine.keeping import Keeper
from tunewright.engine.offload import activations_on_host
from tunewright.engine.precision import compute_as_stored, compute_in, precision_as_stored, suit_storage
from tunewright.engine.trunk_cache import TrunkCache
from tunewright.errors import Fault, TrainError
from tunewright.models.lean import make_lean
from tunewright.models.surgery import channels_last, plain_layout, set_mode
from tunewright.recipe import TrainSpec
from tunewright.rundir import RunDir

Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Workplace:
    """Where and how the arithmetic is done; chosen once and kept on resume."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"


def fit(
    task: Task,
    method: Method,
    loaded: Loaded,
    steps: Steps,
    train: TrainSpec,
    run: RunDir,
    *,
    digest: str,
    workplace: Workplace | None = None,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[State, nn.Module]:
    """Train until the planned steps are done or a callback gives a reason to stop.

    Resuming gives the same numbers as never having stopped. Raises TrainError naming step, rows and module if the loss
    or the gradient is not finite; that step is not taken, and the last checkpoint stands. Raises Interrupted after the
    step during which a signal came is saved.
    """
    place = workplace or Workplace()
    torch.manual_seed(derive_seed(seed, "apply"))  # new adapters are drawn here; a resumed run overwrites them
    before = copy.deepcopy(loaded.model) if task.needs_reference and not method.keeps_base else None
    model = method.apply(loaded.model, loaded).to(place.device)
    loaded.notes += make_lean(model)
    if share()[1] == 1 and (laid_out := channels_last(model, place.device)):
        loaded.notes.append(laid_out)
    precision, why = suit_storage(train.precision, place.precision, model)
    if why:
        say(f"Precision {precision}: {why}.")
        place = dataclasses.replace(place, precision=precision)
    state = State(total=len(steps))
    found, skipped = from_first(lambda: checkpoint.latest(run, digest))
    for sentence in skipped:
        say(sentence)
    if found is None and (solved := begun(task, method, model, loaded, steps, place)):
        plain_layout(model)
        return State(stop=solved), model

    rate = train.learning_rate if train.learning_rate is not None else method.recommended()[0]
    warmup = schedules.warmup_count(train.warmup_steps, len(steps))
    tensors: dict[str, dict[str, Tensor]] = {}
    if found is not None:
        state, tensors, _ = checkpoint.load(found)
        state.total = len(steps)  # other than before only where --allow-change was given
        method.advance(model, loaded, state.step / state.total)
        method.restore(model, tensors["model"])
    optimizer = optimizers.build(train.optim, method.groups(model, loaded, rate, train.weight_decay))
    if found is not None:
        optimizers.load_state(optimizer, tensors["optimizer"])
        say(f"Continuing after step {state.step} of {state.total} (checkpoint {found.name}).")
    same_weights(model)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    trunk = TrunkCache(task, loaded, steps, place.device, place.precision)
    trunk.follow(model)
    for callback in callbacks:
        callback.on_start(state, model)

    keep = Keeper(run, digest, method, train, say, state if found is not None else None)

    def settle() -> None:
        """Evaluate and save where it is time for it."""
        last, is_best, scores = state.step == state.total, False, None
        if evaluate and (state.step % train.eval_steps == 0 or last) and state.judged < state.step:
            scores = evaluate(model)
        with protected():
            if scores is not None:
                is_best = judge(task, state, scores, train, callbacks)
            state.stop = from_first(lambda: state.stop)  # callbacks watch on the first rank alone
            due = state.step % train.save_steps == 0 or (is_best and train.early_stopping_patience)
            if due or keep.owed or last or state.stop:
                keep(state, model, optimizer)
        if last or state.stop or scores is not None:
            leave_if_asked(largest)

    # several processes leave together, after a step; one by itself may also leave while it evaluates
    together = protected() if share()[1] > 1 else contextlib.nullcontext()
    try:
        with together, activations_on_host(model, train.activation_offload):
            if found is not None:
                settle()  # a signal may have come during this very evaluation
            while state.step < state.total and not state.stop:
                with protected():
                    began = time.perf_counter()
                    compile_blocks(model, loaded, train.torch_compile, state.step)
                    drawn = [to_device(batch, place.device) for batch in steps[state.step]]
                    rng = torch.Generator().manual_seed(derive_seed(seed, state.step, "prepare"))
                    with torch.no_grad():
                        model.eval()
                        todo = task.prepare(model, lambda: method.reference(model, before), drawn, loaded, rng)
                    set_mode(model, dropout=task.dropout, train_batch_norm=train.train_batch_norm)
                    for micro_batches in todo:
                        factor = schedules.factor(train.lr_scheduler_type, state.step, state.total, warmup)
                        now = optimizers.set_rate(optimizer, factor, state.step, state.total, warmup)
                        logs = accumulate(task, method, model, loaded, micro_batches, place, seed, state, say, trunk)
                        logs |= {"learning_rate": now, "grad_norm": clip(model, train.max_grad_norm)}
                        stop_unless_finite(logs, state, task, model, loaded, micro_batches)
                        optimizer.step()
                        method.after_step(model, optimizer.param_groups)
                        optimizer.zero_grad(set_to_none=True)
                    synchronize(place.device)
                    state.step += 1
                    state.epoch = steps.epoch(state.step)
                    state.seen += logs.pop("items")
                    state.seconds += time.perf_counter() - began
                    logs["seconds"] = round(state.seconds, 3)
                    if method.advance(model, loaded, state.step / state.total):
                        optimizer = extended(optimizer, train, method, model, loaded, rate)
                        trunk.follow(model)
                    for callback in callbacks:
                        callback.on_step(state, logs)
                leave_if_asked(largest)
                settle()
    except Interrupted as stop:
        with protected():
            keep(state, model, optimizer)
        for callback in callbacks:
            callback.on_error(state, stop)
        saved = "The disk is full, nothing was saved" if keep.owed else "Saved"
        say(f"{saved} after step {state.step} of {state.total}: the same command continues from the last checkpoint.")
        raise
    except BaseException as error:
        for callback in callbacks:
            callback.on_error(state, error)
        raise
    if train.early_stopping_patience and state.best_step is not None and state.best_step != state.step:
        method.restore(model, keep.best(state.best_step))
        say(f"The weights of step {state.best_step} are kept: the best on validation.")
    plain_layout(model)
    for callback in callbacks:
        callback.on_end(state, model)
    return state, model


def begun(task: Task, method: Method, model: nn.Module, loaded: Loaded, steps: Steps, place: Workplace) -> str | None:
    """What the method does with all rows before the first step; why no step is needed, where none is."""
    trunk = TrunkCache(task, loaded, steps, place.device, precision_as_stored(model))
    with compute_as_stored(model, place.device), trunk.once_over(model) as batches:
        return method.start(model, task, loaded, batches)


def accumulate(
    task: Task,
    method: Method,
    model: nn.Module,
    loaded: Loaded,
    micro_batches: Sequence[Batch],
    place: Workplace,
    seed: int,
    state: State,
    say: Callable[[str], None],
    trunk: TrunkCache | None = None,
) -> dict[str, float]:
    """Gradients of one whole step, over all ranks. Counts come first, so that how it is cut never changes the update.

    micro_batches: this rank's; there may be none. Where memory does not reach they are cut in halves, and the step is
    begun anew.
    """
    own = {"": float(len(micro_batches))}  # their number, under a name that no term has
    for batch in micro_batches:
        for term, count in task.weights(batch).items():
            own[term] = own.get(term, 0.0) + count
    counts = total(own)
    num_micro = counts.pop("")
    empty = [term for term, count in counts.items() if count <= 0]
    if empty:
        problem = f"nothing to learn from: {', '.join(empty)} counts no item"
        raise TrainError(Fault(problem, where=f"step {state.step + 1}"))
    while True:
        try:
            cost, logs = _backward(task, model, loaded, micro_batches, place, counts, num_micro, (seed, state), trunk)
            break
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out(error):
                raise
            memory.halve(state, task, micro_batches, error, say)
        model.zero_grad(set_to_none=True)
        memory.give_back()  # only here: the error still held what the forward pass had made
    penalty = method.penalty(model) if is_first() else None  # once a step
    if penalty is not None:
        penalty.backward()
        logs["penalty"] = penalty.item()
    sum_gradients(model)
    return total({"loss": cost, **logs}) | {"items": float(max(counts.values()))}


def _backward(
    task: Task,
    model: nn.Module,
    loaded: Loaded,
    micro_batches: Sequence[Batch],
    place: Workplace,
    counts: dict[str, float],
    num_micro: float,
    key: tuple[int, State],
    trunk: TrunkCache | None,
) -> tuple[float, dict[str, float]]:
    """Forward and backward of each piece; the cost, and the means that the task logs."""
    cost = 0.0
    logs: dict[str, float] = {}
    rank, size = share()
    seed, state = key
    for i, batch in enumerate(micro_batches):
        pieces, rows = memory.cut(batch, state.pieces), memory.rows_of(batch)
        for j, piece in enumerate(pieces):
            # dropout depends on the step and the place in it, not on what ran before or where
            torch.manual_seed(derive_seed(seed, state.step, rank + i * size, *([j] if j else [])))
            with compute_in(place.precision, place.device), trunk.under(piece) if trunk else contextlib.nullcontext():
                loss = task.loss(model, piece, loaded)
            part = torch.stack([value.float() / counts[term] for term, value in loss.totals.items()]).sum()
            part.backward()
            cost += part.item()
            for name, value in loss.logs.items():
                logs[name] = logs.get(name, 0.0) + value / num_micro * memory.rows_of(piece) / rows
    return cost, logs


def clip(model: nn.Module, limit: float) -> float:
    """The norm of all gradients together; scaled down to `limit` where it is larger (0: never)."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
    if limit and limit < norm + 1e-6 < math.inf:  # not finite: gradients stay as they are, they tell where it began
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.item()


def judge(task: Task, state: State, scores: dict[str, float], train: TrainSpec, callbacks: Sequence[Callback]) -> bool:
    """Note an evaluation; True if it is the best so far. Without a new best for long enough the run stops."""
    metric = task.metrics[0]
    value = scores[metric.name]
    better = state.best is None or (value > state.best if metric.higher_is_better else value < state.best)
    is_best = math.isfinite(value) and better
    if is_best:
        state.best, state.best_step, state.stale = value, state.step, 0
    else:
        state.stale += 1
    if train.early_stopping_patience and state.stale >= train.early_stopping_patience:
        state.stop = f"no better {metric.name} on validation for {state.stale} evaluations (best {state.best:.4f})"
    state.judged = state.step
    for callback in callbacks:
        callback.on_evaluate(state, {"split": "validation", **scores})  # type: ignore[dict-item]
    return is_best


def extended(
    optimizer: torch.optim.Optimizer, train: TrainSpec, method: Method, model: nn.Module, loaded: Loaded, rate: float
) -> torch.optim.Optimizer:
    """The optimiser for a changed trainable set; what was already training keeps its moments."""
    old = optimizers.state_by_name(optimizer)
    new = optimizers.build(train.optim, method.groups(model, loaded, rate, train.weight_decay))
    names = {name for group in new.param_groups for name in group["param_names"]}
    optimizers.load_state(new, {k: v for k, v in old.items() if k.partition("::")[0] in names})
    return new
