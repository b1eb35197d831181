"""A tokenizer that was given new tokens, on a base that has no rows for them: the tables grow, by one row a token.

A new row begins as the mean of all old ones (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
Models"): an average word, the same on every machine. Knows transformers' models and tokenizers; no task, no method.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunewright.contracts import Loaded
from tunewright.errors import Fault, MethodError
from tunewright.models.layout import speaks_words

NAMED = 5  # new tokens spelt out in the note


def grow(loaded: Loaded) -> None:
    """Give embedding and output layer a row for every token that the tokenizer knows beyond them.

    Puts the new ids into `loaded.helpers["new_tokens"]` and lines of Python that do the same to a base that was loaded
    without us into `loaded.helpers["growing"]`. Does nothing where the tables are large enough.
    """
    if loaded.layout.embedding is None or not hasattr(loaded.processor, "get_vocab"):
        return
    new = resize(loaded.model, loaded.processor)
    if not new:
        return
    loaded.helpers["new_tokens"] = list(new)
    loaded.helpers["growing"] = _lines(new.stop)
    words = {index: word for word, index in loaded.processor.get_vocab().items()}
    named = ", ".join(repr(words[i]) for i in new[:NAMED] if i in words)
    loaded.notes.append(
        f"The tokenizer knows {len(new)} tokens beyond the {new.start} rows of the base ({named}"
        f"{' ...' if len(new) > NAMED else ''}): they begin as the mean of all others."
    )


def resize(model: Any, tokenizer: Any) -> range:
    """The same for any model by itself; the ids of the rows that were added, an empty range where none were."""
    rows, needed = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        return range(rows, rows)
    model.resize_token_embeddings(needed, mean_resizing=False)  # the mean that it offers is drawn at random
    with torch.no_grad():
        for table in _tables(model):
            table.weight[rows:] = table.weight[:rows].mean(0)
            if getattr(table, "bias", None) is not None:
                table.bias[rows:] = table.bias[:rows].mean()
    return range(rows, needed)


def _tables(model: Any) -> list[Any]:
    return [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]


def _lines(needed: int) -> list[str]:
    return [
        "rows = base.get_input_embeddings().num_embeddings  # the tokenizer has tokens that the base lacks",
        f"base.resize_token_embeddings({needed}, mean_resizing=False)",
        "for table in (base.get_input_embeddings(), base.get_output_embeddings()):",
        "    if table is not None:  # a new row begins as the mean of all old ones",
        "        table.weight.data[rows:] = table.weight.data[:rows].mean(0)",
        '    if getattr(table, "bias", None) is not None:',
        "        table.bias.data[rows:] = table.bias.data[:rows].mean()",
    ]


def new_rows(model: nn.Module, loaded: Loaded) -> dict[str, list[int]]:
    """{table: its new rows}, of which an adapter must train exactly these; {} where nothing grew.

    An output layer that is the embedding itself follows it and is not named. Raises MethodError for one that also has
    a bias: peft would leave the bias out.
    """
    ids, head = loaded.helpers.get("new_tokens"), loaded.layout.head
    if not ids or loaded.layout.embedding is None:
        return {}
    tables = {loaded.layout.embedding: list(ids)}
    if head is None or not speaks_words(model, head):
        return tables
    layer, table = model.get_submodule(head), model.get_submodule(loaded.layout.embedding)
    if getattr(layer, "bias", None) is not None:
        problem = f"the new tokens' rows of {head} cannot train in an adapter, because it has a bias"
        raise MethodError(Fault(problem, where="model", remedy="Use method=full."))
    return tables if layer.weight is table.weight else tables | {head: list(ids)}


def describe_base(config: Path, loaded: Loaded) -> None:
    """An adapter's config.json says how the base is opened, which has as many rows as it came with."""
    ids = loaded.helpers.get("new_tokens")
    if not ids:
        return
    settings = json.loads(config.read_text(encoding="utf-8"))
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if part.get("vocab_size") == ids[-1] + 1:
            part["vocab_size"] = ids[0]
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
