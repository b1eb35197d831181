"""The tables of docs/performance.md, made from peers.jsonl alone. Knows no trainer and measures nothing."""

from __future__ import annotations

from typing import Any


def write(lines: list[dict[str, Any]]) -> None:
    raise NotImplementedError
