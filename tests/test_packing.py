"""Packing: a document in a row with others costs what it costs alone, or the model is refused with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Task
from tunewright.engine.packing import can_pack, packed_collate
from tunewright.errors import RecipeError
from tunewright.models.logprob import IGNORE, causal_logprob
from tunewright.runs import checking
from tunewright.runs.training import train

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
SHAPES = {  # family -> (config class, settings)
    "llama": ("LlamaConfig", SMALL),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", SMALL | LAYERS),
    "gpt2": ("GPT2Config", GPT2),
}
LEAKY = {
    "opt": ("OPTConfig", OPT),
    "gpt_oss": ("GptOssConfig", SMALL | LAYERS | {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
PACKING_TASKS = [name for name in find.names("tasks") if find.find("tasks", name, Task).packs]


def model_of(family: str, attention: str) -> torch.nn.Module:
    import transformers

    name, settings = (SHAPES | LEAKY)[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def examples_of(sizes: list[int], prompt: int = 0) -> list[dict]:
    rng = torch.Generator().manual_seed(1)
    found = []
    for i, n in enumerate(sizes):
        ids = torch.randint(3, 64, (n,), generator=rng)
        labels = ids.clone()
        labels[:prompt] = IGNORE
        found.append({"row": f"r{i}", "input_ids": ids, "labels": labels})
    return found


def costs(model, batch) -> dict[tuple, float]:
    """What every labelled token costs, keyed by its document's tokens up to it, wherever it stands."""
    found = {}
    with torch.no_grad():
        logprob = causal_logprob(model, batch)
    for ids, labels, costs_here, positions in zip(
        batch["input_ids"], batch["labels"], logprob, batch["position_ids"], strict=True
    ):
        for place in range(1, len(ids)):
            if labels[place] != IGNORE:
                before = tuple(ids[place - int(positions[place]) : place + 1].tolist())
                found[before] = costs_here[place - 1].item()
    return found


@pytest.mark.promise(8)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", SHAPES)
def test_c17_packed_costs_what_each_document_costs_alone(family, attention):
    model = model_of(family, attention)
    examples = examples_of([17, 3, 9, 1, 16, 5, 2], prompt=2)
    together = costs(model, packed_collate(examples))
    alone: dict[tuple, float] = {}
    for example in examples:
        ids = example["input_ids"].unsqueeze(0)
        with torch.no_grad():  # transformers' own log-probabilities of one document, no word of ours about positions
            logprob = torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)[0]
        for place in range(2, ids.shape[1]):
            alone[tuple(ids[0, : place + 1].tolist())] = logprob[place - 1, ids[0, place]].item()
    assert together.keys() == alone.keys()
    assert max(abs(together[key] - alone[key]) for key in alone) <= 1e-5
    assert can_pack(model)[0]


@pytest.mark.parametrize("family", LEAKY)
def test_a_family_whose_documents_leak_is_told_apart_with_the_reason(family):
    able, why = can_pack(model_of(family, "eager"))
    assert not able
    assert "leak" in why


def test_a_model_that_takes_no_positions_is_told_apart_with_the_reason():
    class Plain(torch.nn.Module):
        config = type("Config", (), {"vocab_size": 8})

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 8)

        def forward(self, input_ids, use_cache=False): ...

    able, why = can_pack(Plain())
    assert not able
    assert "takes no packed rows" in why


@pytest.mark.promise(8)
def test_every_token_stands_once_no_row_is_longer_than_the_longest_and_first_labels_are_off():
    examples = examples_of([17, 3, 9, 1, 16, 5, 2])
    batch = packed_collate(examples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    assert batch["input_ids"].shape[1] == 17
    assert len(batch["input_ids"]) < len(examples)
    assert sorted(batch["row"]) == sorted(e["row"] for e in examples)
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == IGNORE).all()
    assert int((batch["labels"] != IGNORE).sum()) == sum(len(e["input_ids"]) - 1 for e in examples)


# ------------------------------------------------------------------------- in a run
def last_weights(tiny_recipe, folder, task: str, packing: bool | None):
    options = {
        "max_steps": 3, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "precision": "float32",
        "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0, "packing": packing,
    }  # fmt: skip
    run = train(tiny_recipe(task, train=options), folder, quiet=True, say=lambda text: None)
    return load_file(run.path / "model" / "model.safetensors"), run.read_json("data.json")["settings"]


def test_tasks_that_pack_are_known():
    assert len(PACKING_TASKS) >= 1


@pytest.mark.promise(8)
@pytest.mark.parametrize("task", PACKING_TASKS)
def test_packed_training_is_padded_training(tiny_recipe, tmp_path, monkeypatch, task):
    monkeypatch.setattr(checking, "_sizes", lambda examples: None)  # padded rows come in another order where they may
    packed, said = last_weights(tiny_recipe, tmp_path / "packed", task, None)
    assert any("packed equals alone" in line for line in said)
    padded, _ = last_weights(tiny_recipe, tmp_path / "padded", task, False)
    assert max((packed[name] - padded[name]).abs().max().item() for name in packed) <= 1e-5


def test_a_leaky_base_is_padded_and_refused_only_where_the_recipe_insists(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "how_to_pack", lambda model: (None, "documents leak"))
    ready = checking.prepare(tiny_recipe(PACKING_TASKS[0]))
    task, loaded = checking.load(ready)
    assert "attention_mask" in checking.planned_steps(ready, task, loaded)[0][0]
    assert any("padded, not packed: documents leak." in note for note in loaded.notes)
    insisting = dataclasses.replace(ready.recipe, train=dataclasses.replace(ready.recipe.train, packing=True))
    with pytest.raises(RecipeError, match="documents leak"):
        checking.planned_steps(dataclasses.replace(ready, recipe=insisting), task, loaded)


def test_a_task_of_pictures_cannot_be_packed(tiny_recipe):
    ready = checking.prepare(tiny_recipe("image-classification", train={"packing": True}))
    with pytest.raises(RecipeError, match="no token sequences"):
        checking.planned_steps(ready, *checking.load(ready))
