"""Logits only where a label is: the loss and every gradient of plain transformers, without its matrix."""

from __future__ import annotations

import pytest
import torch

from tunewright.models import label_logits
from tunewright.models.label_logits import find_head
from tunewright.models.logprob import IGNORE, causal_logprob

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {  # family -> settings; what is special about its head
    "Llama": SMALL | {"tie_word_embeddings": False},
    "Qwen2": SMALL | {"tie_word_embeddings": True},
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 4, "tie_word_embeddings": False},  # a bias
    "Gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
    "Cohere": SMALL | {"logit_scale": 0.25},
    "Granite": SMALL | {"logits_scaling": 3.0},
    "Mixtral": SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "OPT": {
        "vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def model_of(family: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def batch_of(rows: int = 3, length: int = 11) -> dict:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (rows, length), generator=rng)
    labels = ids.masked_fill(torch.rand(rows, length, generator=rng) < 0.5, IGNORE)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    labels[0, 8:] = IGNORE
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def plain(model, batch) -> torch.Tensor:
    """Transformers' own logits, whole, and torch's own cross-entropy."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    cost = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none", ignore_index=IGNORE
    )
    return -cost.view_as(labels)


def gradients(model, found, factors) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (found * factors).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(model, batch, factors, *, fine: float = 1e-6) -> None:
    ours, theirs = causal_logprob(model, batch), plain(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=fine, atol=fine)
    got, wanted = gradients(model, ours, factors), gradients(model, theirs, factors)
    assert got.keys() == wanted.keys()
    assert got
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    errors = {name: (got[name] - gradient).norm() for name, gradient in wanted.items()}
    assert torch.stack(list(errors.values())).norm() <= fine * whole
    for name, gradient in wanted.items():  # a key's bias has no gradient but rounding: it moves every score alike
        assert errors[name] <= 5 * fine * gradient.norm() + 0.1 * fine * whole, name
    with torch.inference_mode():
        torch.testing.assert_close(causal_logprob(model, batch), theirs, rtol=fine, atol=fine)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setitem(label_logits.ROOM, "cpu", 4 * 96)  # four rows at a time, so that there are several


@pytest.mark.parametrize("trains", ["all", "head", "body"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_matrix(family, trains):
    model = model_of(family)
    assert find_head(model).module is model.get_output_embeddings(), find_head(model).why
    own = {id(p) for p in model.get_output_embeddings().parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(trains == "all" or (id(parameter) in own) == (trains == "head"))
    same(model, batch_of(), 1 / 17)  # a sum over a count, as in every loss by the token


def test_tokens_that_weigh_differently_get_their_own_gradients():
    factors = torch.linspace(-1, 2, 30).view(3, 10)  # as preferences do, by row
    for family in ("Llama", "GPTJ", "Gemma2"):
        same(model_of(family), batch_of(), factors)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_an_adapter_on_the_head_learns_what_it_learns_elsewhere(targets):
    import peft

    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of("Llama"), config).eval()
    same(model, batch_of(), 1.0)
    same(model, batch_of(), torch.linspace(-1, 2, 30).view(3, 10))


def test_dropout_in_an_adapted_head_is_drawn_again_the_same():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(model_of("Llama"), config)
    found = {}
    for name, factors in (("even", torch.ones(3, 10)), ("uneven", torch.ones(3, 10))):
        model.train()
        factors[0, 0] += 1e-7 * (name == "uneven")  # next to nothing, but no longer one number for all
        torch.manual_seed(3)
        found[name] = gradients(model, causal_logprob(model, batch_of()), factors)
    for name, gradient in found["even"].items():
        torch.testing.assert_close(found["uneven"][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_before_the_text_are_no_text(kind):
    import peft

    from tunewright.models.virtual_tokens import put_right

    model = peft.get_peft_model(model_of("Llama"), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    put_right(model)
    assert find_head(model).module is not None
    same(model.eval(), batch_of(), 1.0)


def test_a_batch_without_labels_costs_nothing_and_has_gradients_of_nought():
    model, batch = model_of("Llama"), batch_of()
    batch["labels"].fill_(IGNORE)
    found = causal_logprob(model, batch)
    assert found.shape == (3, 10)
    assert not found.any()
    assert all(not g.any() for g in gradients(model, found, 1.0).values())


@pytest.mark.parametrize("stored", [False, True])
def test_bf16_agrees_as_far_as_its_digits_go(stored):
    """Computed in bf16, or stored in it and computed as stored."""
    model, batch = model_of("Llama"), batch_of()
    if stored:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not stored):
        ours, theirs = causal_logprob(model, batch), plain(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    got, wanted = gradients(model, ours, 1.0), gradients(model, theirs, 1.0)
    for name, gradient in wanted.items():
        assert torch.cosine_similarity(got[name].float().flatten(), gradient.float().flatten(), 0) > 0.999, name


class Odd(torch.nn.Module):
    """Does to its logits what no word of its config says."""

    def __init__(self):
        super().__init__()
        self.inner = model_of("Llama")
        self.config, self.lm_head = self.inner.config, self.inner.lm_head

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output["logits"] = output["logits"] - output["logits"].mean(-1, keepdim=True)
        return output


def test_a_model_with_an_unknown_ending_keeps_its_own_way_and_the_reason_is_there():
    model = Odd().eval()
    assert find_head(model).module is None
    assert "not those of its output layer" in find_head(model).why
    same(model, batch_of(), 1.0)


def test_the_head_is_asked_anew_when_it_was_replaced():
    model = model_of("Llama")
    find_head(model)
    model.lm_head = torch.nn.Linear(32, 96)
    assert find_head(model).module is model.lm_head
    same(model, batch_of(), 1.0)


def test_asking_leaves_the_model_as_it_was():
    model = model_of("Llama").train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    find_head(model)
    assert model.training
    assert not model.model.layers[0].training
    assert torch.equal(state, torch.get_rng_state())


def test_the_whole_matrix_is_never_made():
    model, batch = model_of("Llama"), batch_of()
    find_head(model)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim and out.shape[-1] == 96 and out.shape[0] != 32:  # the weight
                sizes.append(out.numel())
            return out

    with Watch():
        causal_logprob(model, batch).sum()
    assert 0 < max(sizes) <= 4 * 96


def test_who_listens_to_a_model_hears_every_token_where_asked():
    model, batch = model_of("Llama"), batch_of()
    heard: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: heard.append(output.logits))
    short = causal_logprob(model, batch)
    with label_logits.every_logit():
        whole = causal_logprob(model, batch)
    assert heard[-1].shape == (*batch["input_ids"].shape, 96)
    assert heard[-2].shape[1] == 1
    torch.testing.assert_close(short, whole, rtol=1e-6, atol=1e-6)
