"""Documents that attend by themselves: what each costs alone, its gradients too, and nobody else's mask is touched."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.test_packing import SHAPES, SMALL, costs, examples_of
from tunewright.engine.memory import cut, rows_of
from tunewright.engine.packing import can_pack, how_to_pack, one_row_collate, packed_collate
from tunewright.models import attention
from tunewright.models.attention import NAME, attend_by_document, attend_in_rows
from tunewright.models.logprob import causal_logprob

FAMILIES = {
    **SHAPES,
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 6}),
    "neox": (
        "GPTNeoXConfig",
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3},
    ),
}  # fmt: skip
SIZES = [17, 3, 9, 1, 16, 5, 2]


def model_of(family: str, **named) -> torch.nn.Module:
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **named).eval()


def alone(model, examples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of costs and gradients of each document by itself, in transformers' own attention."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for example in examples:
        ids, labels = example["input_ids"][None], example["labels"][None, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        cost = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), labels.reshape(-1), reduction="sum")
        cost.backward()
        total += cost.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.promise(8)
@pytest.mark.parametrize("collate", [one_row_collate, packed_collate])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_a_row_are_documents_alone_with_every_gradient(family, collate, monkeypatch):
    model = model_of(family)
    examples = examples_of(SIZES, prompt=2)
    wanted, slopes = alone(model, examples)
    assert attend_by_document(model)
    by_document = []
    plain = attention._split
    monkeypatch.setattr(attention, "_split", lambda *given: by_document.append(1) or plain(*given))
    model.zero_grad(set_to_none=True)
    cost = -causal_logprob(model, collate(examples)).sum()
    cost.backward()
    assert len(by_document) == 3 * 2, "query, key and value of two layers"
    torch.testing.assert_close(cost.detach(), wanted, rtol=1e-6, atol=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(model.get_parameter(name).grad, slope, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_rows_that_are_not_packed_are_transformers_own_bit_by_bit(family):
    model = model_of(family)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]
    with torch.no_grad():
        before = [model(**given).logits for given in inputs]
        written = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert attend_by_document(model)
        assert all(torch.equal(model(**given).logits, one) for given, one in zip(inputs, before, strict=True))
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)


def test_a_recomputed_layer_sees_its_documents_too():
    examples = examples_of(SIZES)
    model = model_of("llama")
    _, slopes = alone(model, examples)
    assert attend_by_document(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad(set_to_none=True)
    (-causal_logprob(model, one_row_collate(examples)).sum()).backward()
    for name, slope in slopes.items():
        torch.testing.assert_close(model.get_parameter(name).grad, slope, rtol=1e-4, atol=2e-5, msg=name)


def test_what_it_does_not_know_keeps_its_own_way():
    eager = model_of("llama")
    eager.set_attn_implementation("eager")
    assert not attend_by_document(eager)
    chunked = model_of("llama")
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert not attend_by_document(chunked)
    assert chunked.config._attn_implementation == "sdpa"


def test_a_model_that_fails_its_question_gets_its_own_attention_back(monkeypatch):
    model = model_of("llama")
    plain = attention._attend

    def wrong(module, query, key, value, mask, **named):
        return plain(module, query, key, value * (1.1 if mask is not None and mask.ndim == 2 else 1), mask, **named)

    monkeypatch.setattr(attention, "_attend", wrong)
    collate, why = how_to_pack(model)
    assert model.config._attn_implementation == "sdpa"
    assert collate is packed_collate
    assert "by itself" not in why
    monkeypatch.undo()
    collate, why = how_to_pack(model)
    assert (collate, model.config._attn_implementation) == (one_row_collate, NAME)
    assert "by itself" in why
    attend_in_rows(model)
    assert can_pack(model)[0]


def test_nothing_is_left_of_one_row_and_it_is_cut_between_documents():
    examples = examples_of(SIZES, prompt=1)
    batch = one_row_collate(examples)
    assert batch["input_ids"].shape == (1, sum(SIZES))
    assert rows_of(batch) == len(SIZES)
    for pieces in (1, 2, 3, 7, 9):
        parts = cut(batch, pieces)
        assert len(parts) == min(pieces, len(SIZES))
        assert [row for part in parts for row in part["row"]] == batch["row"]
        assert torch.equal(torch.cat([part["input_ids"] for part in parts], dim=1), batch["input_ids"])
        assert all(int(part["position_ids"][0, 0]) == 0 for part in parts)
    model = model_of("llama")
    assert attend_by_document(model)
    whole, found = costs(model, batch), {}
    for part in cut(batch, 3):
        found |= costs(model, part)
    assert found == pytest.approx(whole, abs=1e-5)


def test_attention_is_float32_inside_a_bf16_model():
    examples = examples_of([30, 12, 25], prompt=2)
    model = model_of("llama")
    with torch.no_grad():
        exact = causal_logprob(model, packed_collate(examples))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = causal_logprob(model, packed_collate(examples))
            assert attend_by_document(model)
            ours = causal_logprob(model, packed_collate(examples))
    assert not torch.equal(ours, exact)
    assert (ours - exact).abs().mean() <= 1.2 * (half - exact).abs().mean(), "no coarser than torch's own"


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_a_padding_mask_of_two_axes_is_never_taken_for_documents(kind, monkeypatch):
    handed_on = []
    monkeypatch.setattr(attention, "own_sdpa", lambda: lambda module, q, k, v, mask, **named: handed_on.append(mask))
    mask, states = torch.ones(2, 3).to(kind), torch.zeros(2, 1, 3, 4)
    attention._attend(torch.nn.Module(), states, states, states, mask)
    assert handed_on[0] is mask
