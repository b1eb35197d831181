"""What a work needs and what the machine can give: useful FLOPs by formula, GEMM rates and bandwidth by measurement.

Useful is what LoRA or full tuning cannot do without: no padding, no logits where no label is, nothing computed twice.
Per token, with D hidden, M MLP, L layers, r rank, V vocabulary, W = L (4 D^2 + 3 D M) weights of the products and
A = L r (8 D + 3 (D + M)) numbers of the adapters:

    LoRA   4 W + 6 A, less 2 (3 D^2 + 3 r D) for the first q, k, v: below them nothing trains
    full   6 W
    head   4 V D (frozen) or 6 V D (trained) for every token with a label but none for the others
    attention   6 D T (T + 1) L for a document of T tokens: six products (two forward, four backward), causal half

Two FLOPs are a product and a sum. Norms, activations, softmax and the optimiser are left out. Knows no trainer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from peer_works import RANK, SHAPES, VOCABULARY, Work

TOKENS, LABELLED = 1024, 256  # rows of a product in the blocks, and of one piece of the head
SECONDS, REPEATS = 0.15, 5
LARGE, SMALL = 2**28, 2**22  # bytes copied: far beyond the caches, and within them


def useful_flops(
    shape: tuple[int, int, int, int], documents: Sequence[tuple[int, int]], method: str, vocabulary: int, rank: int
) -> int:
    """FLOPs of one pass over documents, each (tokens, tokens with a label)."""
    hidden, layers, _, mlp = shape
    weights = layers * (4 * hidden**2 + 3 * hidden * mlp)
    adapters = layers * rank * (8 * hidden + 3 * (hidden + mlp))
    tokens, learnt = sum(t for t, _ in documents), sum(n for _, n in documents)
    if method == "lora":
        blocks, head = 4 * weights + 6 * adapters - 2 * (3 * hidden**2 + 3 * rank * hidden), 4
    else:
        blocks, head = 6 * weights, 6
    attention = sum(6 * hidden * t * (t + 1) * layers for t, _ in documents)
    return blocks * tokens + head * vocabulary * hidden * learnt + attention


def flops_of(work: Work, rows: int) -> int:
    """Of a whole run of a language work on its sample of rows."""
    import peer_data

    documents = [(len(r["prompt"]) + len(r["completion"]), len(r["completion"])) for r in peer_data.conversations(rows)]
    return work.epochs * useful_flops(SHAPES[work.base], documents, work.method, VOCABULARY, RANK)


# ------------------------------------------------------------------ measurement
def run(work: Work) -> None:
    """GFLOP/s of the work's products in both precisions and GB/s of copying, as the last line of this process."""
    import torch
    from peer_meter import processor, versions

    torch.set_num_threads(1)
    hidden, _, _, mlp = SHAPES[work.base]
    products = [(TOKENS, hidden, hidden), (TOKENS, hidden, mlp), (TOKENS, mlp, hidden), (LABELLED, hidden, VOCABULARY)]
    found = {
        f"{name} {rows}x{k}x{n}": round(gemm(rows, k, n, getattr(torch, name)), 1)
        for name in ("float32", "bfloat16")
        for rows, k, n in [*products, (2048, 2048, 2048)]
    }
    from tunewright.engine.products import choose_products

    if choose_products():  # the better of the two libraries is the ceiling, whoever uses it
        again = ((rows, k, n, gemm(rows, k, n, torch.float32)) for rows, k, n in [*products, (2048, 2048, 2048)])
        found |= {f"float32 by oneDNN {rows}x{k}x{n}": round(rate, 1) for rows, k, n, rate in again}
    memory = {"256 MB": round(copying(LARGE), 1), "4 MB": round(copying(SMALL), 1)}
    print(json.dumps({"gflops": found, "copy_gb_s": memory, "versions": versions(), "cpu": processor()}))


def gemm(rows: int, k: int, n: int, dtype: object) -> float:
    """GFLOP/s of x @ W.T on random numbers, the best of a few."""
    import torch

    x, weight = (torch.randn(shape).to(dtype) for shape in ((rows, k), (n, k)))  # type: ignore[call-overload]
    return 2e-9 * rows * k * n / fastest(lambda: torch.nn.functional.linear(x, weight))


def copying(size: int) -> float:
    """GB/s of a copy, what is read and what is written both counted."""
    import torch

    source = torch.rand(size // 4)
    target = torch.empty_like(source)
    return 2e-9 * size / fastest(lambda: target.copy_(source))


def fastest(act: Callable[[], object]) -> float:
    """CPU seconds of one act: of a few stretches of repeated acts, the quickest, since this is about a limit."""
    act()
    found = []
    for _ in range(REPEATS):
        count, began = 0, time.process_time()
        while time.process_time() - began < SECONDS:
            act()
            count += 1
        found.append((time.process_time() - began) / count)
    return min(found)
