"""An encoded example as bytes, and back: the same tensors, the same plain values, in the same order.

Knows no task. What is large or odd is not packed.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from tunewright.contracts import Example

LARGEST = 64 << 10  # bytes of one example: a text of 4,000 tokens with labels; a picture has more
DTYPES = {str(dtype): dtype for dtype in (torch.int64, torch.int32, torch.float32, torch.bool)}
PLAIN = (str, int, float, bool, type(None))


def packed(example: Example) -> bytes | None:
    """The example as bytes; None where it is too large, or holds what would not come back the same."""
    head: list[tuple[Any, ...]] = []  # (key, value), or (key, dtype, shape) of a tensor whose numbers follow
    numbers = b""
    for key, value in example.items():
        if isinstance(value, Tensor):
            if value.device.type != "cpu" or str(value.dtype) not in DTYPES or value.requires_grad:
                return None
            if len(numbers) + value.numel() * value.element_size() > LARGEST:
                return None
            numbers += value.numpy().tobytes()
            head.append((key, str(value.dtype), list(value.shape)))
        elif type(value) in PLAIN:
            head.append((key, value))
        else:
            return None
    start = json.dumps(head, separators=(",", ":")).encode()
    return len(start).to_bytes(4, "little") + start + numbers


def unpacked(held: bytes) -> Example:
    """What `packed` was given."""
    place = 4 + int.from_bytes(held[:4], "little")
    example: Example = {}
    for key, value, *shape in json.loads(held[4:place]):
        if not shape:
            example[key] = value
            continue
        dtype, count = DTYPES[value], math.prod(shape[0])
        end = place + count * dtype.itemsize
        # a bytearray of its own: what is done to one example's tensor reaches no other
        flat = torch.frombuffer(bytearray(held[place:end]), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        example[key], place = flat.reshape(shape[0]), end
    return example
