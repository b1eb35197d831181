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

from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Method, Task
from tunewright.errors import Fault, MethodError
from tunewright.models import low_rank
from tunewright.models.layout import expert_parameters, linear_names, speaks_words
from tunewright.models.surgery import train_in_float32

EVA_BATCHES = 32  # micro-batches whose inputs are looked at: the directions of a few hundred rows hardly change
ALL = ("all-linear", "all")


@dataclass(frozen=True)
class Lora(Method):
    r: int = 8  # rank: 8 for classifiers; more where there is more to store (docs/facts.md)
    lora_alpha: int | None = None  # scale is alpha / r (with use_rslora: alpha / sqrt(r)); None: 2 r
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

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r is {self.r}: a rank is 1 or more")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"lora_alpha is {self.lora_alpha}: 1 or more, or nothing for 2 r")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: a share from 0 up to 1")
        if isinstance(self.target_modules, str) and self.target_modules not in ALL:
            raise ValueError(f'target_modules is "{self.target_modules}": "all-linear" or a list of names')
        if not self.loraplus_lr_ratio > 0:
            raise ValueError(f"loraplus_lr_ratio is {self.loraplus_lr_ratio}: more than 0")
        if self.use_dora and self.init_lora_weights in low_rank.FROM_WEIGHTS:
            raise ValueError(
                f"use_dora with init_lora_weights: {self.init_lora_weights} cannot be saved as one adapter"
            )

    def remarks(self) -> list[str]:
        slow = "use_dora (weight-decomposed, no dropout) takes about 1.7 times the time of plain LoRA."
        return [slow] if self.use_dora else []

    @property
    def keeps_base(self) -> bool:
        return True

    # ------------------------------------------------------------------- inserting
    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        import peft

        head = loaded.fresh or ((loaded.layout.head,) if loaded.layout.head else ())
        # a language model's head is often its embedding too: a trained copy would come apart from it
        own = loaded.fresh or tuple(name for name in head if not speaks_words(model, name))
        experts = self._experts(model, loaded)
        how = self.init_lora_weights
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self._targets(model, head),
            target_parameters=experts or None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=how if how == "gaussian" else True,
            trainable_token_indices=low_rank.new_tokens(model, loaded),
            # a head that is not named here stays random, untrained and unsaved, without a word (docs/facts.md)
            modules_to_save=list(own) or None,
        )
        with low_rank.between_libraries():
            adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        low_rank.lend_attributes(adapted)
        # peft writes where the weights lay on this machine; the id as the user gave it means something elsewhere
        config.base_model_name_or_path = loaded.origin.get("checkpoint")
        config.revision = loaded.origin.get("revision") or None
        if how in low_rank.FROM_WEIGHTS:
            low_rank.start_from_weights(adapted, how)
        train_in_float32(adapted)
        return adapted

    def _experts(self, model: nn.Module, loaded: Loaded) -> list[str]:
        """Fused weights of a mixture of experts, which are no linear layers and which all-linear does not reach."""
        found = expert_parameters(model, loaded.layout.blocks)
        if self.target_parameters is not None:
            if lost := [t for t in self.target_parameters if not any(n == t or n.endswith(f".{t}") for n in found)]:
                expected = "some of " + ", ".join(sorted({".".join(n.split(".")[-3:]) for n in found}) or ["none here"])
                raise MethodError(Fault(f"{lost} match no fused weight", "method.target_parameters", "", expected))
            return list(self.target_parameters)
        chosen = found if self.target_modules in ALL else []
        barred = "lora_dropout" if self.lora_dropout else "use_dora" if self.use_dora else ""
        if chosen and barred:
            remedy = f"Leave {barred} out, or give target_parameters: [] to leave the experts frozen."
            problem = f"{barred} cannot be had on the fused weights of experts"
            raise MethodError(Fault(problem, where=f"method.{barred}", remedy=remedy))
        if chosen:
            kinds = sorted({n.rpartition(".")[2] for n in chosen})
            loaded.notes.append(f"Experts are adapted too ({', '.join(kinds)}, {len(chosen)} fused weights).")
        return chosen

    def _targets(self, model: nn.Module, head: tuple[str, ...]) -> list[str]:
        """Full names of the layers to adapt, shortened to last segments where those mean the same layers."""
        linear = linear_names(model, without=head)
        if isinstance(self.target_modules, str):
            chosen = linear
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
        short = sorted({n.rpartition(".")[2] for n in chosen})
        reached = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in short]
        return short if sorted(reached) == sorted(chosen) else chosen

    # -------------------------------------------------------------------- training
    def start(self, model: nn.Module, task: Task, loaded: Loaded, batches: Iterable[Batch]) -> str | None:
        if self.init_lora_weights == "eva":
            places = low_rank.start_from_inputs(model, task, loaded, batches, EVA_BATCHES)
            loaded.notes.append(
                f"A begins as the main directions of the inputs of {places} layers (EVA, one rank for all)."
            )
        return None

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
        import peft

        with low_rank.between_libraries():
            model = peft.PeftModel.from_pretrained(loaded.model, str(folder))  # type: ignore[arg-type]
        low_rank.lend_attributes(model)
        return model

    def opening(self, loaded: Loaded) -> list[str]:
        lines = super().opening(loaded)
        return lines if not low_rank.lacks_attributes(loaded.model) else [*lines, *low_rank.LENDING]
