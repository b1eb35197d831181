"""Padded places left out between the first and the last block: real tokens stand end to end there, in one row.

Between its blocks an encoder treats every token by itself but for attention, which finds its rows again by their
places. Whether a model is like that is the caller's to ask (engine/unpadding.py): this file only does it, to blocks
that are given hidden states and one mask of padding, and leaves every other call as it is. Knows no model class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models.attention import FOREIGN, own_sdpa

WORTH = 0.03  # share of padded places below which moving tokens costs more than it saves
ROUND = 32  # tokens; some padded places stay, so that products of few shapes are met: each new one is compiled


@dataclass(frozen=True)
class Places:
    """Where B rows of T places have their N real tokens; travels through the blocks where a mask would."""

    mask: Tensor  # as the model made it: (B, 1, T, T) bool
    real: Tensor  # (N,) int64: the place of each token that is kept among all B * T; a few padded ones are among them
    among: Tensor  # (B * T,) int64: the token at each place; at padded ones any token

    @classmethod
    def of(cls, mask: Tensor, always: bool = False) -> Places | None:
        """None where the mask is not one of padding alone, or (unless `always`) hides too little to be worth it."""
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
            return None
        there = mask[:, 0, 0].clone()
        if not torch.equal(mask, there[:, None, None].expand_as(mask)):
            return None
        flat = there.flatten()
        more = 0 if always else -int(flat.sum()) % ROUND
        flat[(~flat).nonzero().squeeze(-1)[:more]] = True
        if not always and float(flat.float().mean()) > 1 - WORTH:
            return None
        return cls(mask, flat.nonzero().squeeze(-1), (flat.cumsum(0) - 1).clamp_(min=0))

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        flat = padded.reshape(self.among.numel(), -1)
        return _Taken.apply(flat, self.real, None).view(1, -1, *padded.shape[2:])  # type: ignore[no-any-return,no-untyped-call]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...); what stands at padded places is any token's: nobody looks there."""
        flat = packed.reshape(self.real.numel(), -1)
        rows, places = self.mask.shape[0], self.mask.shape[-1]
        return _Taken.apply(flat, self.among, self.real).view(rows, places, *packed.shape[2:])  # type: ignore[no-any-return,no-untyped-call]


class _Taken(torch.autograd.Function):
    """Lines of a matrix by their numbers. back: where each line's slope is found; None: lines not taken have none."""

    @staticmethod
    def forward(ctx: Any, lines: Tensor, which: Tensor, back: Tensor | None) -> Tensor:
        ctx.save_for_backward(which, back)
        ctx.count = len(lines)
        return lines.index_select(0, which)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        which, back = ctx.saved_tensors
        if back is not None:
            return slope.index_select(0, back), None, None
        return slope.new_zeros(ctx.count, slope.shape[1]).index_copy_(0, which, slope), None, None


# --------------------------------------------------------------------- attention
def attend_by_places() -> None:
    """From now on, in this process, attention by torch's kernels understands places where a mask would be."""
    from transformers import AttentionInterface

    own = own_sdpa()
    if getattr(own, "knows_places", False):
        return

    def sdpa(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *given: Any, **named: Any
    ) -> tuple[Tensor, None]:
        if not isinstance(mask, Places):
            return own(module, query, key, value, mask, *given, **named)  # type: ignore[no-any-return]
        if foreign := [name for name in FOREIGN if named.get(name) is not None]:
            raise ValueError(f"{', '.join(foreign)} cannot be had without padding")
        padded = (mask.unpack(tensor.transpose(1, 2)).transpose(1, 2) for tensor in (query, key, value))
        return mask.pack(own(module, *padded, mask.mask, *given, **named)[0]), None

    sdpa.knows_places = True  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", sdpa)


# ------------------------------------------------------------------------ blocks
@contextlib.contextmanager
def unpadded(blocks: Sequence[nn.Module], always: bool = False) -> Iterator[list[Places]]:
    """Inside, these blocks, called one after the other, get real tokens alone; collects the places of each call.

    always: also where little is padded, to the last place.
    """
    found: list[Places] = []
    now: list[Places] = []

    def enter(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        masks = [value for value in (*args, *named.values()) if isinstance(value, Tensor) and value.dtype == torch.bool]
        if module is blocks[0]:
            now[:] = _places(args, named, masks, always)
            found.extend(now)
        if not now:
            return None
        place = now[0]
        args = tuple(place if any(value is mask for mask in masks) else value for value in args)
        named = {key: place if any(value is mask for mask in masks) else value for key, value in named.items()}
        return ((place.pack(args[0]), *args[1:]) if module is blocks[0] else args), named

    def leave(module: nn.Module, args: Any, named: Any, output: Any) -> Any:
        if not now:
            return None
        place = now.pop()
        if isinstance(output, Tensor):
            return place.unpack(output)
        return (place.unpack(output[0]), *output[1:])

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [blocks[-1].register_forward_hook(leave, with_kwargs=True)] if blocks else []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _places(args: tuple[Any, ...], named: dict[str, Any], masks: list[Tensor], always: bool) -> list[Places]:
    """Of a call with hidden states, one mask and no other tensor; else none."""
    tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
    hidden = args[0] if args else None
    if len(masks) != 1 or len(tensors) != 2 or not isinstance(hidden, Tensor) or hidden.ndim != 3:
        return []
    if masks[0].shape[0] != hidden.shape[0] or masks[0].shape[-1] != hidden.shape[1]:
        return []
    place = Places.of(masks[0], always)
    return [place] if place else []
