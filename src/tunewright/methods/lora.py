"""LoRA: a frozen weight plus a trained low-rank product. Through peft, in PEFT's own format.

Use it when in doubt: near full tuning from a few hundred rows on, a tenth of its memory, and a file of a few
megabytes beside the base.

Hu et al. 2021, arXiv 2106.09685. Defaults after "LoRA Without Regret" (Schulman 2025): all linear layers, a rate about
ten times that of full tuning. `use_dora` is Weight-Decomposed LoRA (Liu et al. 2024, arXiv 2402.09353), which has
nothing to do with dropout: that is `lora_dropout`. Knows Layout, never a model class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Loss, Method, Task
from tunewright.data.batches import sample
from tunewright.errors import Fault, MethodError
from tunewright.models import fused_lora, low_rank, masks, peft_adapters, vocabulary
from tunewright.models.layout import VALUES, linear_names, within
from tunewright.models.places import own_head, whole_head

QUERIES_AND_VALUES = ("query", "q_proj", "q_lin", "q", "wq", "query_proj", *VALUES)
EVA_BATCHES = 32  # micro-batches whose inputs are looked at: the directions of a few hundred rows hardly change
ALL = ("all-linear", "all")
NAMED = 3  # layers spelt out in a note


@dataclass(frozen=True)
class Lora(Method):
    r: int = 8  # rank: 8 for classifiers; more where there is more to store
    # scale is alpha / r, with use_rslora alpha / sqrt(r); None: 2 r, with use_rslora 6: both are a scale of 2 at r = 8
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"  # or last name segments: [query, value]
    # fused 3-D weights of experts; None: with all-linear every one there is
    target_parameters: tuple[str, ...] | None = None
    use_rslora: bool = False  # Kalajdzievski 2023: keeps large ranks (32 and more) from learning ever more slowly
    use_dora: bool = False  # Weight-Decomposed: length and direction of each row apart; about 1.7 times the time
    # pissa: the largest singular directions of the weight; olora: its first orthogonal ones; eva: those of the inputs
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora", "eva"] = "default"
    loraplus_lr_ratio: float = 1.0  # rate of B / rate of A; 16 in LoRA+ (Hayou et al. 2024)

    learning_rate: ClassVar[float] = 1e-3
    learning_rate_reason: ClassVar[str] = "ten to twenty times that of full tuning, nearly whatever the rank"
    standalone: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ("peft",)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r is {self.r}: a rank is 1 or more")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"lora_alpha is {self.lora_alpha}: 1 or more, or nothing for its default")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: a share from 0 up to 1")
        if isinstance(self.target_modules, str) and self.target_modules not in ALL:
            raise ValueError(f'target_modules is "{self.target_modules}": "all-linear" or a list of names')
        if not self.loraplus_lr_ratio > 0:
            raise ValueError(f"loraplus_lr_ratio is {self.loraplus_lr_ratio}: more than 0")
        if self.use_dora and self.init_lora_weights in low_rank.FROM_WEIGHTS:
            how = self.init_lora_weights
            raise ValueError(
                f"use_dora with init_lora_weights: {how}: what {how} takes off would miss from the lengths"
            )

    def recommended(self) -> tuple[float, str]:
        names = self.target_modules
        few = isinstance(names, tuple) and names and all(n.rpartition(".")[2] in QUERIES_AND_VALUES for n in names)
        rate, why = self.learning_rate, self.learning_rate_reason
        if few:
            rate, why = 3e-3, "few matrices must go further: on TREC-6, 88 % right at 3e-3 against 84 % at 1e-3"
        if self.init_lora_weights == "pissa":
            rate *= 0.3
            why = "a third of plain LoRA's, for what moves are the largest directions: 1e-3 was 4 points worse on SST-2"
        if self.loraplus_lr_ratio != 1:
            # 1e-3 for A and 1.6e-2 for B learnt nothing from 100 rows of SST-2; 2.5e-4 and 4e-3 did better than LoRA
            return (
                rate / self.loraplus_lr_ratio**0.5,
                f"of A; B has {self.loraplus_lr_ratio:g} times it, around {rate:g}",
            )
        return rate, why

    def remarks(self) -> list[str]:
        said = {
            "pissa": "Before the first step, pissa takes the singular value decomposition of every matrix.",
            "olora": "Before the first step, olora takes the QR decomposition of every matrix.",
            "eva": f"Before the first step, eva looks at the inputs of every matrix in up to {EVA_BATCHES} batches; "
            "all keep the same rank.",
        }
        found = [said[self.init_lora_weights]] if self.init_lora_weights in said else []
        if self.init_lora_weights in low_rank.FROM_WEIGHTS:
            found.append(f"The adapter is saved as plain LoRA of rank {2 * self.r}, twice r, for the base as it is.")
        if self.use_dora:
            found.append("use_dora (weight-decomposed, no dropout) takes about 1.7 times the time of plain LoRA.")
        return found

    @property
    def keeps_base(self) -> bool:
        return True

    # ------------------------------------------------------------------- inserting
    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        import peft

        head = whole_head(loaded)
        experts = self._experts(model, loaded)
        how = self.init_lora_weights
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha or (6 if self.use_rslora else 2 * self.r),
            lora_dropout=self.lora_dropout,
            target_modules=self._targets(model, head, loaded),
            target_parameters=experts or None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=how if how == "gaussian" else True,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's (in, out)
            trainable_token_indices=vocabulary.new_rows(model, loaded) or None,
            # a head that is not named here stays random, untrained and unsaved, without a word (docs/facts.md)
            modules_to_save=list(own_head(model, loaded)) or None,
        )
        adapted = peft_adapters.put_on(model, config, loaded)
        if how in low_rank.FROM_WEIGHTS:
            low_rank.start_from_weights(adapted, how)
        fused_lora.fuse(adapted)
        return adapted

    def _experts(self, model: nn.Module, loaded: Loaded) -> list[str]:
        """Fused weights of a mixture of experts, which are no linear layers and which all-linear does not reach."""
        fused = [n for names in masks.expert_modules(model).values() for n in names if model.get_parameter(n).ndim == 3]
        if self.target_parameters is None:
            chosen = fused if self.target_modules in ALL else []
        else:
            chosen = self._named_parameters(model, loaded, fused)
        if not chosen:
            return []
        if barred := "lora_dropout" if self.lora_dropout else "use_dora" if self.use_dora else "":
            remedy = f"Leave {barred} out, or give target_parameters: [] to leave the experts frozen."
            problem = f"{barred} cannot be had on the fused weights of experts"
            raise MethodError(Fault(problem, where=f"method.{barred}", remedy=remedy))
        kinds = sorted({n.rpartition(".")[2] for n in chosen})
        said = (
            f"Experts are adapted too ({', '.join(kinds)}; {len(chosen)} fused weights, rank {self.r} for each expert)"
        )
        unlike = self.init_lora_weights in (*low_rank.FROM_WEIGHTS, "eva")
        start = f"; {self.init_lora_weights} does not reach them: they begin as in plain LoRA" if unlike else ""
        loaded.notes.append(f"{said}; what routes tokens to them stays frozen{start}.")
        return chosen

    def _named_parameters(self, model: nn.Module, loaded: Loaded, fused: list[str]) -> list[str]:
        """What `target_parameters` names: experts, or a router that is no linear layer."""
        found = [n for n, p in model.named_parameters() if p.ndim in (2, 3) and within(n, loaded.layout.blocks)]
        wanted = {t: [n for n in found if n == t or n.endswith(f".{t}")] for t in self.target_parameters or ()}
        if lost := [t for t, names in wanted.items() if not names]:
            expected = "some of " + ", ".join(sorted({".".join(n.split(".")[-3:]) for n in fused}) or ["none here"])
            raise MethodError(Fault(f"{lost} match no fused weight", "method.target_parameters", "", expected))
        return [n for names in wanted.values() for n in names]

    def _targets(self, model: nn.Module, head: tuple[str, ...], loaded: Loaded) -> list[str]:
        """Full names of the layers to adapt, shortened to last segments where those mean the same layers."""
        linear = linear_names(model, without=head)
        if isinstance(self.target_modules, str):
            # a router is a matrix that is no product of the network: moved, it would send tokens to other experts
            routers = set(masks.matrices(model)) - set(masks.products(model))
            chosen = [n for n in linear if f"{n}.weight" not in routers]
        else:
            chosen = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in self.target_modules)]
            segments = sorted({n.rpartition(".")[2] for n in linear})
            lost = [t for t in self.target_modules if not any(n == t or n.endswith(f".{t}") for n in chosen)]
            if lost:
                raise MethodError(
                    Fault(
                        f"{lost} match no module",
                        where="method.target_modules",
                        expected="some of " + ", ".join(segments),
                    )
                )
        if not chosen:
            problem = "this model has no matrix product outside its head"
            raise MethodError(Fault(problem, where="method lora", remedy="Use method=head or full."))
        if self.use_dora and (dead := low_rank.without_length(model, chosen)):
            chosen = [n for n in chosen if n not in dead]
            loaded.notes.append(
                f"DoRA leaves {len(dead)} of {len(chosen) + len(dead)} products as they are ({', '.join(dead[:NAMED])}"
                f"{' ...' if len(dead) > NAMED else ''}): some of their outputs have weights that are all 0, and what "
                "has no length has no direction."
            )
        short = sorted({n.rpartition(".")[2] for n in chosen})
        reached = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in short]
        return short if sorted(reached) == sorted(chosen) else chosen

    # -------------------------------------------------------------------- training
    def start(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> str | None:
        if self.init_lora_weights == "eva":
            low_rank.start_from_inputs(model, self._passes(model, task, loaded, sample(batches, EVA_BATCHES)))
        return None

    def _passes(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> Iterator[Loss]:
        """One forward pass after another, as the loop would make them."""
        device = next(model.parameters()).device
        rng = torch.Generator().manual_seed(0)
        for batch in batches:
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            for step in task.prepare(model, lambda: self.reference(model, None), [moved], loaded, rng):
                for micro in step:
                    yield task.loss(model, micro, loaded)

    def groups(
        self, model: nn.Module, loaded: Loaded, learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        groups = []
        for group in super().groups(model, loaded, learning_rate, weight_decay):
            lengths = [(n, p) for n, p in group["params"] if "lora_magnitude_vector" in n]
            out = [(n, p) for n, p in group["params"] if ".lora_B." in n and self.loraplus_lr_ratio != 1]
            apart = {n for n, _ in (*lengths, *out)}
            rest = [(n, p) for n, p in group["params"] if n not in apart]
            groups += [
                group | {"params": rest},
                group | {"params": lengths, "weight_decay": 0.0},  # decay would shorten every row of the weight
                group | {"params": out, "lr": learning_rate * self.loraplus_lr_ratio},
            ]
        return [group for group in groups if group["params"]]

    @contextlib.contextmanager
    def reference(self, model: nn.Module, start: nn.Module | None) -> Iterator[nn.Module]:
        with model.disable_adapter():  # type: ignore[operator]
            yield model

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return super().state(model) | low_rank.starts(model)

    # --------------------------------------------------------------------- keeping
    def merge(self, model: nn.Module) -> nn.Module:
        """Folded in float32: bf16 merging loses digits, and repeated merging changes the base (docs/facts.md)."""
        return low_rank.folded(model)

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        low_rank.save(model, loaded, folder)

    def open(self, loaded: Loaded, folder: Path) -> nn.Module:
        return peft_adapters.reopen(loaded, folder)

    def opening(self, loaded: Loaded) -> list[str]:
        return peft_adapters.opening(loaded, super().opening(loaded))
