"""Models and rows of the works, made from seeds alone: Llama shapes with a tokenizer of words, rows of skewed length.

One word is one token, so that tokens can be counted by hand. Every side reads the same files: `train.jsonl` (prompt and
completion) for who tokenises itself, `tokens.jsonl` (input_ids and labels) for who does not. Knows no trainer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from peer_works import SHAPES, VOCABULARY

ROWS, MEDIAN, LONGEST = 512, 115, 1024
SPREAD = 0.825  # of a log-normal: with the longest rows cut at LONGEST the mean is 160
RESPONSE = 0.51  # share of the tokens that are learnt
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
END = 2
IGNORE = -100
FILES = ("train", "test", "tokens", "spoken")
# no words of its own: a row is its prompt, its completion and an end token, whoever renders it
TEMPLATE = "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else ' ') }}{% endfor %}"


# ------------------------------------------------------------------------ rows
def lengths(rows: int = ROWS) -> np.ndarray:
    """Tokens of each row, shortest first: the quantiles of a log-normal, cut to 16 .. 1024."""
    from statistics import NormalDist

    places = [NormalDist().inv_cdf((i + 0.5) / rows) for i in range(rows)]
    return np.clip(np.round(MEDIAN * np.exp(SPREAD * np.array(places))), 16, LONGEST).astype(int)


def every_kth(rows: int, of: int) -> np.ndarray:
    """Places of `rows` among `of` sorted ones: the middle of each of so many equal parts."""
    return ((np.arange(rows) + 0.5) * of / rows).astype(int)


def conversations(rows: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """prompt and completion (with its end token) as ids, in a random order; words by Zipf, so that there is to learn.

    The rows of a sample are rows of the whole: every k-th of the sorted lengths.
    """
    rng = np.random.default_rng(seed)
    sizes = lengths()
    shares = rng.uniform(0.22, 0.80, ROWS)
    shares *= RESPONSE * sizes.sum() / (shares * sizes).sum()
    weights = 1 / (np.arange(VOCABULARY - len(SPECIAL)) + 10.0)
    words = rng.choice(np.arange(len(SPECIAL), VOCABULARY), size=(ROWS, LONGEST), p=weights / weights.sum())
    found = []
    for i in every_kth(rows, ROWS):
        size, learnt = int(sizes[i]), max(2, round(float(shares[i] * sizes[i])))
        ids = words[i, : size - 1].tolist()
        found.append({"prompt": ids[: size - learnt], "completion": [*ids[size - learnt :], END]})
    return [found[i] for i in rng.permutation(rows)]


def order(rows: int, seed: int = 0) -> list[int]:
    """The order in which `tunewright` takes packed rows in its first pass (data/batches.py): for the peers' files."""
    return np.random.default_rng([seed, 0]).permutation(rows).tolist()


def adapter_seed(seed: int = 0) -> int:
    """What `tunewright` draws new adapters from (data/batches.py): on the same numbers, curves can be held together."""
    return int.from_bytes(hashlib.sha256(f"{seed}/apply".encode()).digest()[:7], "little")


def write_rows(folder: Path, rows: int) -> Path:
    """train.jsonl, tokens.jsonl (in the order of the first pass) and test.jsonl of so many rows; made once."""
    folder = folder / f"sft-{rows}"
    if (folder / "test.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    made = conversations(rows)
    write(folder / "train.jsonl", [spoken(row) for row in made])
    write(folder / "tokens.jsonl", [tokens(made[i]) for i in order(rows)])
    write(folder / "spoken.jsonl", [spoken(made[i]) for i in order(rows)])
    write(folder / "test.jsonl", [spoken(row) for row in conversations(4, seed=1)])  # written last: means complete
    return folder


def spoken(row: dict[str, list[int]]) -> dict[str, str]:
    """Prompt and completion as text; the end token is the template's."""
    return {"prompt": words(row["prompt"]), "completion": words(row["completion"][:-1])}


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def tokens(row: dict[str, list[int]]) -> dict[str, list[int]]:
    return {
        "input_ids": row["prompt"] + row["completion"],
        "labels": [IGNORE] * len(row["prompt"]) + row["completion"],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------- models
def write_model(folder: Path, shape: str) -> Path:
    """A Llama of this shape with random weights and a tokenizer that knows w4 .. w31999; made once."""
    folder = folder / f"llama-{shape}"
    if (folder / "tokenizer.json").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, mlp = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=LONGEST,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=END, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """A tokenizer of words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {name: i for i, name in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=LONGEST, **names)
    made.chat_template = TEMPLATE
    return made
