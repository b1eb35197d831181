"""(IA)3: the vectors where the paper puts them, by hand; their number; folding; what plain peft opens."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import shared

from tunewright import find
from tunewright.contracts import Loaded, Method
from tunewright.errors import MethodError
from tunewright.models.layout import layout_of
from tunewright.models.places import down_projections, keys_and_values
from tunewright.models.surgery import count_parameters, set_mode
from tunewright.runs import checking
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train

TEXT, IMAGE, WRITING = "text-classification", "image-classification", "causal-lm"


def ia3() -> Method:
    return find.build("methods", "ia3", {}, Method)


def adapted(tiny_recipe, task=TEXT):
    """(prepared, task, loaded, adapted model, untouched copy of the base)."""
    ready = checking.prepare(tiny_recipe(task, method="ia3"))
    task_object, loaded = checking.load(ready)
    base = copy.deepcopy(loaded.model).eval()
    return ready, task_object, loaded, ready.method.apply(loaded.model, loaded).eval(), base


def moved(model, by=0.3):
    """As after training: every number that trains somewhere else."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_of(ready, task, loaded, n=3):
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:n]])
    return {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}


def bare(architecture, config, **settings):
    """(model, loaded) of an architecture made here, random."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**settings)).eval()
    return model, Loaded(model, None, layout_of(model))


def vectors(model):
    return {n.replace("base_model.model.", ""): p for n, p in model.named_parameters() if ".ia3_l." in n}


# --------------------------------------------------------------------- the formula
@pytest.mark.parametrize("task", [TEXT, IMAGE, WRITING])
def test_the_start_equals_the_base_to_the_last_bit(tiny_recipe, task):
    ready, task_object, loaded, model, base = adapted(tiny_recipe, task)
    inputs = inputs_of(ready, task_object, loaded)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
        assert not torch.equal(moved(model)(**inputs).logits, base(**inputs).logits)


def test_keys_values_and_inner_activation_are_scaled_and_nothing_else(tiny_recipe):
    """A base whose key, value and output weights are multiplied by hand answers the same."""
    ready, task, loaded, model, base = adapted(tiny_recipe)
    moved(model)
    scaled = {n.rpartition(".ia3_l.")[0]: p.detach().flatten() for n, p in vectors(model).items()}
    assert len(scaled) == 2 * 3
    with torch.no_grad():
        for name, scale in scaled.items():
            layer = base.get_submodule(name)
            if name.endswith(("key", "value")):
                layer.weight.mul_(scale[:, None])
                layer.bias.mul_(scale)
            else:
                assert name.endswith("output.dense")
                assert "attention" not in name
                layer.weight.mul_(scale[None, :])  # W2 (l * h) = (W2 diag(l)) h
        for place in loaded.fresh:
            own = model.get_submodule(f"base_model.model.{place}").modules_to_save["default"].state_dict()
            base.get_submodule(place).load_state_dict(own)
        inputs = inputs_of(ready, task, loaded)
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=1e-5, rtol=1e-4)


def test_attention_by_the_papers_equation(tiny_recipe):
    """softmax(Q (l_k K)^T / sqrt(d)) (l_v V), one head at a time."""
    _, _, _, model, _ = adapted(tiny_recipe)
    attention = moved(model).base_model.model.bert.encoder.layer[0].attention.self
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = attention(x)[0]
        plain = {n: getattr(attention, n) for n in ("query", "key", "value")}
        q = plain["query"](x)
        k = plain["key"].base_layer(x) * plain["key"].ia3_l["default"].flatten()
        v = plain["value"].base_layer(x) * plain["value"].ia3_l["default"].flatten()
        parts = []
        for head in range(2):
            cut = slice(8 * head, 8 * head + 8)
            shares = torch.softmax(q[..., cut] @ k[..., cut].transpose(1, 2) / 8**0.5, dim=-1)
            parts.append(shares @ v[..., cut])
    torch.testing.assert_close(found, torch.cat(parts, dim=-1), atol=1e-5, rtol=1e-4)


def test_a_convolutional_net_has_its_output_channels_scaled(tiny_recipe):
    _, _, _, model, base = adapted(tiny_recipe, IMAGE)
    moved(model)
    names = [n.rpartition(".ia3_l.")[0] for n in vectors(model)]
    assert names == [n for n in layout_of(base).mlp]
    assert len(names) == 2 * 2 + 1, "two in each of two layers, and a shortcut"
    layer = model.get_submodule(f"base_model.model.{names[-1]}")
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scale = layer.ia3_l["default"].reshape(-1, 1, 1)
        torch.testing.assert_close(layer(x), base.get_submodule(names[-1])(x) * scale)


def test_vectors_of_convolutions_move_at_a_tenth_and_it_is_said(tiny_recipe):
    for task, share in ((TEXT, 1.0), (IMAGE, 0.1)):
        ready, _, loaded, model, _ = adapted(tiny_recipe, task)
        rates = {}
        for group in ready.method.groups(model, loaded, 0.5, 0.1):
            rates |= dict.fromkeys((name for name, _ in group["params"] if ".ia3_l." in name), group["lr"])
        assert set(rates.values()) == {0.5 * share}
        assert len(rates) == len(vectors(model))
        assert any("at 0.1 of the learning rate" in note for note in loaded.notes) == (task == IMAGE)


# ------------------------------------------------------------------------ counting
def test_it_trains_a_number_for_each_key_value_and_inner_feature(tiny_recipe):
    blocks, width, inner = 2, 16, 32
    _, _, _, model, _ = adapted(tiny_recipe, WRITING)
    heads, key_value_heads = 2, 1
    shared_width = width // heads * key_value_heads
    assert count_parameters(model)[0] == blocks * (2 * shared_width + inner)
    _, _, loaded, model, _ = adapted(tiny_recipe, TEXT)
    head = sum(p.numel() for place in loaded.fresh for p in loaded.model.get_submodule(place).parameters()) // 2
    assert count_parameters(model)[0] == blocks * (2 * width + inner) + head


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
# model: (config, settings, what is scaled at its output, what at its input), by last segments
FAMILIES = {
    "GPT2Model": ("GPT2Config", GPT2, {"attn.c_attn"}, {"mlp.c_proj"}),
    "DistilBertModel": (
        "DistilBertConfig",
        {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 24, "vocab_size": 20},
        {"attention.k_lin", "attention.v_lin"},
        {"ffn.lin2"},
    ),
    "BertForSequenceClassification": (
        "BertConfig",
        SMALL | {"intermediate_size": 16},
        {"self.key", "self.value"},
        {"output.dense"},
    ),
    "LlamaModel": (
        "LlamaConfig",
        SMALL | {"intermediate_size": 16, "num_key_value_heads": 2},
        {"self_attn.k_proj", "self_attn.v_proj"},
        {"mlp.down_proj"},
    ),
    "ModernBertModel": ("ModernBertConfig", SMALL | {"pad_token_id": 0}, {"attn.Wqkv"}, {"mlp.Wo"}),
    "MixtralModel": (
        "MixtralConfig",
        SMALL | {"num_key_value_heads": 2, "num_local_experts": 3},
        {"self_attn.k_proj", "self_attn.v_proj"},
        set(),
    ),
    "Qwen2MoeModel": (
        "Qwen2MoeConfig",
        SMALL
        | {
            "num_key_value_heads": 2,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        {"self_attn.k_proj", "self_attn.v_proj"},
        {"shared_expert.down_proj"},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_scaled_is_found_by_structure_and_folds(name):
    config, settings, outputs, inputs = FAMILIES[name]
    model, loaded = bare(name, config, **settings)
    assert {".".join(n.split(".")[-2:]) for n in keys_and_values(loaded.layout)[0]} == outputs
    downs = down_projections(model, loaded.layout)
    assert {".".join(n.split(".")[-2:]) for n in downs} == inputs
    assert len(downs) == 2 * len(inputs)
    method = ia3()
    ids = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        before = model(**ids)[0]
        adapted_model = method.apply(model, loaded).eval()
        assert torch.equal(adapted_model(**ids)[0], before)
        own = moved(adapted_model)(**ids)[0]
        torch.testing.assert_close(method.merge(adapted_model)(**ids)[0], own, atol=1e-5, rtol=1e-4)
    assert (own - before).abs().max() > 1e-4
    assert any("queries too" in note for note in loaded.notes) == (len(outputs) == 1)


def test_a_model_with_nothing_to_scale_is_refused_with_a_way_out():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(MethodError, match=r"no keys.*\n?.*method=lora"):
        ia3().apply(model, Loaded(model, None, layout_of(model)))


# -------------------------------------------------------------------- what moves
@pytest.mark.parametrize("task", [TEXT, IMAGE, WRITING])
def test_vectors_and_head_move_in_steps_and_nothing_else(tiny_recipe, task):
    ready, task_object, loaded, model, _ = adapted(tiny_recipe, task)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = task_object.collate([task_object.encode(r, loaded) for r in ready.data.train[:8]])
    optimizer = torch.optim.SGD(ready.method.groups(model, loaded, 0.1, 0.0))
    set_mode(model)
    for _ in range(3):
        sum(task_object.loss(model, batch, loaded).totals.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if ".ia3_l." in n or ".modules_to_save." in n}
    assert len(changed) >= 5


def test_decay_reaches_the_head_and_never_a_vector(tiny_recipe):
    ready, _, loaded, model, _ = adapted(tiny_recipe)
    groups = ready.method.groups(model, loaded, 1e-2, 0.1)
    decayed = [n for g in groups for n, _ in g["params"] if g["weight_decay"]]
    assert decayed
    assert not any(".ia3_l." in n for n in decayed)
    assert sum(".ia3_l." in n for g in groups for n, _ in g["params"]) == 6


def test_the_reference_is_the_base_head_included(tiny_recipe):
    ready, task, loaded, model, base = adapted(tiny_recipe)
    inputs = inputs_of(ready, task, loaded)
    with torch.no_grad():
        tuned = moved(model)(**inputs).logits
        with ready.method.reference(model, None) as off:
            assert torch.equal(off(**inputs).logits, base(**inputs).logits)
        assert torch.equal(model(**inputs).logits, tuned)


def test_writing_with_a_cache_is_writing_without(tiny_recipe):
    ready, task, loaded, model, _ = adapted(tiny_recipe, WRITING)
    moved(model)
    inputs = {k: v[:1, :6] for k, v in inputs_of(ready, task, loaded).items()}
    wanted = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, **wanted, use_cache=True), model.generate(**inputs, **wanted, use_cache=False)
    )


# ---------------------------------------------------------------------- the file
@pytest.mark.parametrize("task", [TEXT, IMAGE, WRITING])
def test_plain_peft_opens_it_with_equal_outputs(tiny_recipe, tmp_path, task):
    import peft
    import transformers

    recipe = tiny_recipe(task, method="ia3", train={"max_steps": 6, "learning_rate": 0.05})
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    predictor = open_run(run.path)
    rows = checking.prepare(recipe).data.test[:3]
    batch = predictor.task.collate([predictor.task.encode(r, predictor.loaded) for r in rows])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
    config = transformers.AutoConfig.from_pretrained(run.path / "model")
    auto = getattr(transformers, predictor.task.auto_class)
    base = auto.from_pretrained(recipe.model.checkpoint, config=config, ignore_mismatched_sizes=True).eval()
    theirs = peft.PeftModel.from_pretrained(base, str(run.path / "model")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, predictor.model(**inputs).logits, atol=1e-6, rtol=1e-5)
        with theirs.disable_adapter():
            assert (theirs(**inputs).logits - predictor.model(**inputs).logits).abs().max() > 1e-4
    said = json.loads((run.path / "model/adapter_config.json").read_text())
    assert said["peft_type"] == "IA3"
    assert said["base_model_name_or_path"] == recipe.model.checkpoint
    assert not (run.path / "model/README.md").exists()


def test_a_real_mobilenet_starts_at_its_base_and_folds():
    import transformers

    folder = shared("models/mobilenet_v2_1.0_224")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    method = ia3()
    with torch.no_grad():
        before = model(pixel_values=x).logits
        tuned = method.apply(model, Loaded(model, None, layout_of(model))).eval()
        assert torch.equal(tuned(pixel_values=x).logits, before)
        own = moved(tuned, 0.05)(pixel_values=x).logits
        merged = method.merge(tuned)(pixel_values=x).logits
    assert len(vectors(tuned)) == 2 * 16
    assert (own - before).abs().max() > 0.1
    torch.testing.assert_close(merged, own, atol=1e-3, rtol=1e-3)
