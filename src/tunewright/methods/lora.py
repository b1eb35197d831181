"""LoRA: a frozen weight plus a trained low-rank product. Through peft, in PEFT's own format.

Use it when in doubt: near full tuning from a few hundred rows on, a tenth of its memory, and a file of a few
megabytes beside the base.

Hu et al. 2021, arXiv 2106.09685. Defaults after "LoRA Without Regret" (Schulman 2025): all linear layers, a rate about
ten times that of full tuning. Knows Layout, never a model class.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from tunewright.contracts import Loaded, Method
from tunewright.errors import Fault, MethodError
from tunewright.models.layout import linear_names, speaks_words
from tunewright.models.surgery import train_in_float32


@dataclass(frozen=True)
class Lora(Method):
    r: int = 8  # rank: 8 for classifiers; more where there is more to store (docs/facts.md)
    lora_alpha: int | None = None  # scale is alpha / r; None: 2 r
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"  # or last name segments: [query, value]

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
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(f'target_modules is "{self.target_modules}": "all-linear" or a list of names')

    @property
    def keeps_base(self) -> bool:
        return True

    def apply(self, model: nn.Module, loaded: Loaded) -> nn.Module:
        import peft

        head = loaded.fresh or ((loaded.layout.head,) if loaded.layout.head else ())
        # a language model's head is often its embedding too: a trained copy would come apart from it
        own = loaded.fresh or tuple(name for name in head if not speaks_words(model, name))
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self._targets(model, head),
            # a head that is not named here stays random, untrained and unsaved, without a word (docs/facts.md)
            modules_to_save=list(own) or None,
        )
        with _between_libraries():
            adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        # peft writes where the weights lay on this machine; the id as the user gave it means something elsewhere
        config.base_model_name_or_path = loaded.origin.get("checkpoint")
        config.revision = loaded.origin.get("revision") or None
        train_in_float32(adapted)
        return adapted

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
        short = sorted({n.rpartition(".")[2] for n in chosen})
        reached = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in short]
        return short if sorted(reached) == sorted(chosen) else chosen

    @contextlib.contextmanager
    def reference(self, model: nn.Module, start: nn.Module | None) -> Iterator[nn.Module]:
        with model.disable_adapter():  # type: ignore[operator]
            yield model

    def merge(self, model: nn.Module) -> nn.Module:
        """Folded in float32: bf16 merging loses digits, and repeated merging changes the base (docs/facts.md)."""
        return copy.deepcopy(model).float().merge_and_unload(safe_merge=True)  # type: ignore[operator]

    def save(self, model: nn.Module, loaded: Loaded, folder: Path) -> None:
        model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]  # none was trained
        model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]  # label names stand here
        loaded.processor.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours stands in the run folder

    def open(self, loaded: Loaded, folder: Path) -> nn.Module:
        import peft

        with _between_libraries():
            return peft.PeftModel.from_pretrained(loaded.model, str(folder))  # type: ignore[arg-type]


@contextlib.contextmanager
def _between_libraries() -> Iterator[None]:
    """Without the deprecations that peft and transformers owe each other: a user can mend none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
