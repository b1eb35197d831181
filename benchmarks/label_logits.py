"""Logits only where a label is, against the whole matrix: CPU time and peak memory of one training step.

    python benchmarks/label_logits.py                      five rounds, interleaved, medians with their range
    python benchmarks/label_logits.py --rounds 3 --labelled 1.0 --train head

Same weights, same rows, same gradients (checked here too). Every measurement is a process of its own, one thread:
peak memory is the process's highest resident size above what it had before the step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

SHAPE = {
    "vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


def measure(kind: str, rows: int, length: int, labelled: float, trains: str) -> dict[str, float]:
    import torch
    import transformers

    from tunewright.models.logprob import IGNORE, causal_logprob, label_logprob

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains == "all" or ("lm_head" in name) == (trains == "head"))
    ids = torch.randint(SHAPE["vocab_size"], (rows, length))
    labels = ids.masked_fill(torch.rand(rows, length) >= labelled, IGNORE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def whole() -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return label_logprob(model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:])

    causal_logprob(model, {name: tensor[:1, :8] for name, tensor in batch.items()}).sum().backward()  # warm
    model.zero_grad(set_to_none=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    cost = -(causal_logprob(model, batch) if kind == "labels" else whole()).mean()
    cost.backward()
    seconds = time.process_time() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {"seconds": seconds, "megabytes": peak, "loss": cost.item(), "norm": norm.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--labelled", type=float, default=0.5)
    parser.add_argument("--train", choices=["all", "head", "body"], default="body")
    parser.add_argument("--one", choices=["labels", "whole"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.rows, asked.length, asked.labelled, asked.train)))
        return
    found: dict[str, list[dict[str, float]]] = {"whole": [], "labels": []}
    own = ["--rows", str(asked.rows), "--length", str(asked.length), "--labelled", str(asked.labelled)]
    for _ in range(asked.rounds):
        for kind, results in found.items():
            words = [sys.executable, __file__, "--one", kind, "--train", asked.train, *own]
            done = subprocess.run(
                words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    whole, labels = found["whole"][0], found["labels"][0]
    assert abs(whole["loss"] - labels["loss"]) <= 1e-6 * whole["loss"], (whole, labels)
    assert abs(whole["norm"] - labels["norm"]) <= 1e-5 * whole["norm"], (whole, labels)
    for kind, results in found.items():
        for unit in ("seconds", "megabytes"):
            values = [r[unit] for r in results]
            print(f"{kind:<7} {unit:<10} {statistics.median(values):8.2f} [{min(values):.2f} .. {max(values):.2f}]")


if __name__ == "__main__":
    main()
