"""Prefix tuning against independent truths: the closed mask, one attention by hand, the hard prompt, plain peft."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_tree
from test_prompt import MASK, PROMPTS, TEXT, by_hand, other_family, small

from tunewright import find
from tunewright.contracts import Method
from tunewright.errors import MethodError, RecipeError
from tunewright.models.generation import generate_ids
from tunewright.models.surgery import count_parameters
from tunewright.recipe import Recipe
from tunewright.runs import checking
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train

COUNT = 16


def prefixed(tiny_recipe, task="causal-lm", **options):
    """(method, task, loaded, base as it was, adapted model)"""
    ready = checking.prepare(tiny_recipe(task, method={"name": "prefix", **options}))
    task_object, loaded = checking.load(ready)
    base = copy.deepcopy(loaded.model).eval()
    torch.manual_seed(0)
    return ready.method, task_object, loaded, base, ready.method.apply(loaded.model, loaded).eval()


def rows(model):
    return model.prompt_encoder["default"].embedding.weight


def scattered(model):
    with torch.no_grad():
        rows(model).copy_(torch.randn(rows(model).shape, generator=torch.Generator().manual_seed(0)))
    return model


# --------------------------------------------------------------- what a prefix is
@torch.no_grad()
def test_a_prefix_with_its_mask_closed_is_the_base(tiny_recipe):
    _, _, _, base, model = prefixed(tiny_recipe)
    closed = torch.cat([torch.zeros(2, COUNT, dtype=torch.int64), MASK], dim=1)
    inputs = {"input_ids": TEXT, "past_key_values": scattered(model).get_prompt(2), "use_cache": False}
    found = model.base_model(attention_mask=closed, **inputs).logits
    expected = base(input_ids=TEXT, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], atol=1e-5, rtol=1e-5)
    opened = model(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits
    assert opened.shape == expected.shape
    assert (opened - expected)[MASK == 1].abs().max() > 0.05, "an open one is not"


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
@torch.no_grad()
def test_closed_in_an_encoder_it_is_the_base_with_every_text_as_many_places_later(tiny_recipe, family):
    """Learned positions go on behind the prefix; nothing else of it may show."""
    loaded = other_family(tiny_recipe, small(f"{family}ForSequenceClassification", f"{family}Config"))
    base = copy.deepcopy(loaded.model)
    model = find.build("methods", "prefix", {"num_virtual_tokens": 4}, Method).apply(loaded.model, loaded)
    places = torch.arange(6).expand(2, -1) + 4 + (1 if family == "Roberta" else 0)
    if family == "Roberta":  # padding keeps the place of the padding index
        places = places.masked_fill(MASK == 0, 0)
    expected = base(input_ids=TEXT, attention_mask=MASK, position_ids=places).logits
    opened = scattered(model)(input_ids=TEXT, attention_mask=MASK).logits
    assert (opened - expected).abs().max() > 1e-3
    closed = torch.cat([torch.zeros(2, 4), MASK], dim=1)
    close = model.base_model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: (args, inputs | {"attention_mask": closed}), with_kwargs=True
    )
    found = model(input_ids=TEXT, attention_mask=MASK).logits
    close.remove()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_attention_head_mixes_text_and_prefix_by_the_prefix_share_of_its_softmax(tiny_recipe):
    """Li and Liang 2021, as a gate: (1 - l) Attention(q, K, V) + l Attention(q, prefix keys, prefix values)."""
    _, _, _, _, model = prefixed(tiny_recipe, "text-classification", num_virtual_tokens=3)
    attention = model.base_model.bert.encoder.layer[1].attention.self
    seen: dict[str, torch.Tensor] = {}
    for name in ("query", "key", "value"):
        layer = getattr(attention, name)
        layer.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    attention.register_forward_hook(lambda module, args, out: seen.update(out=out[0]))
    scattered(model)(input_ids=TEXT[:1], attention_mask=MASK[:1])
    width, head = 8, 1  # two heads of eight; the second
    q, k, v = (seen[name][0][:, head * width : (head + 1) * width] for name in ("query", "key", "value"))
    stored = rows(model).reshape(3, 2, 2, 2, width)  # token, layer, key or value, head
    pk, pv = stored[:, 1, 0, head], stored[:, 1, 1, head]
    text, prefix = (torch.exp(q @ keys.T / width**0.5) for keys in (k, pk))
    share = prefix.sum(-1, keepdim=True) / (prefix.sum(-1, keepdim=True) + text.sum(-1, keepdim=True))
    plain, own = (s / s.sum(-1, keepdim=True) @ values for s, values in ((text, v), (prefix, pv)))
    expected = (1 - share) * plain + share * own
    assert share.min() > 0.05
    found = seen["out"].reshape(6, -1)[:, head * width : (head + 1) * width]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------ what it begins as
@torch.no_grad()
def test_it_begins_as_the_hard_prompt_of_a_given_text(tiny_recipe):
    _, _, loaded, base, model = prefixed(tiny_recipe, init="text", init_text="good sun day", num_virtual_tokens=5)
    ids = loaded.processor.convert_tokens_to_ids(["good", "sun", "day", "good", "sun"])
    hard = torch.cat([torch.tensor(ids).expand(2, -1), TEXT], dim=1)
    expected = base(input_ids=hard, attention_mask=torch.cat([torch.ones(2, 5, dtype=torch.int64), MASK], 1)).logits
    found = model(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(found[MASK == 1], expected[:, 5:][MASK == 1], atol=1e-5, rtol=1e-5)
    assert any("repeated to 5" in note for note in loaded.notes)


def test_the_ways_to_begin_differ_and_keep_to_the_seed(tiny_recipe):
    words, again, noise = (rows(prefixed(tiny_recipe, init=i)[-1]).detach() for i in (None, "vocabulary", "random"))
    assert torch.equal(words, again)
    assert noise.std() == pytest.approx(1.0, abs=0.1), "peft's own start"
    assert words.std() < 0.8


# ---------------------------------------------------------------- called as before
@pytest.mark.parametrize("size", [1, 2, 7])
def test_generate_is_decoding_word_by_word_for_every_batch_size(tiny_recipe, size):
    _, _, loaded, base, model = prefixed(tiny_recipe)
    scattered(model)
    expected = [by_hand(model, ids, 6) for ids in PROMPTS]
    found = []
    for start in range(0, 7, size):
        prompts = [torch.tensor(ids) for ids in PROMPTS[start : start + size]]
        found += generate_ids(model, loaded.processor, prompts, 6, ends=[len(loaded.processor) + 1])
    assert found == expected
    assert found != [by_hand(base, ids, 6) for ids in PROMPTS], "the prefix matters"


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
@torch.no_grad()
def test_the_reference_is_the_base_and_comes_back(tiny_recipe, task):
    method, _, _, base, model = prefixed(tiny_recipe, task)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.5)
    moved = model(input_ids=TEXT, attention_mask=MASK).logits
    with method.reference(model, None) as reference:
        found = reference(input_ids=TEXT, attention_mask=MASK).logits
    assert torch.equal(found, base(input_ids=TEXT, attention_mask=MASK).logits)
    assert torch.equal(model(input_ids=TEXT, attention_mask=MASK).logits, moved)
    assert not torch.equal(moved, found)


# ------------------------------------------------------------------ what trains
def test_keys_and_values_of_every_layer_train_and_nothing_is_there_twice(tiny_recipe):
    """2 x layers x tokens x width of the keys; the tiny Llama has two heads and one pair of keys and values."""
    assert count_parameters(prefixed(tiny_recipe)[-1])[0] == 2 * 2 * COUNT * 8
    assert count_parameters(prefixed(tiny_recipe, "text-classification")[-1])[0] == 2 * 2 * COUNT * 16 + 16 * 2 + 2
    network = 5 * 8 + (8 * 8 + 8) + (8 * 32 + 32)  # tokens, the first layer, the second
    assert count_parameters(prefixed(tiny_recipe, prefix_projection=True, num_virtual_tokens=5)[-1])[0] == network


def test_rates_follow_the_options(tiny_recipe):
    method, _, loaded, _, model = prefixed(tiny_recipe, "text-classification", prefix_projection=True)
    assert method.recommended()[0] == 5e-4
    for options, asked, head in (({}, 3e-2, 3e-3), ({"prefix_projection": True}, 5e-4, 3e-3),
                                 ({"head_learning_rate_ratio": 2.0}, 1e-2, 2e-2)):  # fmt: skip
        groups = find.build("methods", "prefix", options, Method).groups(model, loaded, asked, 0.1)
        assert [g["lr"] for g in groups] == pytest.approx([asked, head, head])
        assert [g["weight_decay"] for g in groups] == [0.0, 0.1, 0.0]


def test_what_its_network_made_is_saved_and_answers_alike(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        "causal-lm",
        method={"name": "prefix", "prefix_projection": True},
        train={"max_steps": 10, "learning_rate": 1e-2, "precision": "float32"},
    )
    kept = []
    from tunewright.contracts import Callback

    class Keep(Callback):
        def on_end(self, state, model):
            kept.append(copy.deepcopy(model).eval())

    run = train(recipe, tmp_path / "run", callbacks=[Keep()], quiet=True, say=lambda text: None)
    model = open_run(run.path).model
    assert rows(model).shape == (COUNT, 2 * 2 * 8), "the network is gone"
    inputs = {"input_ids": TEXT, "attention_mask": MASK}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, kept[0](**inputs).logits, atol=1e-6, rtol=1e-6)


# ----------------------------------------------------------------- what cannot be
def test_gradient_checkpointing_is_refused_before_the_first_step(tmp_path):
    tree = tiny_tree("causal-lm", tmp_path) | {"method": "prefix", "train": {"gradient_checkpointing": True}}
    with pytest.raises(MethodError, match=r"gradient_checkpointing.*method=prompt"):
        train(Recipe.of(tree)[0], tmp_path / "run", quiet=True, say=lambda text: None)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.filterwarnings("ignore")
def test_because_a_layer_computed_twice_loses_the_prefix_and_stops_over_two_sizes(tiny_recipe):
    _, _, _, _, model = prefixed(tiny_recipe)
    model.train()
    model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(RuntimeError, match=r"size of tensor a \(6\) must match the size of tensor b \(22\)"):
        model(input_ids=TEXT, attention_mask=MASK, use_cache=False)


@pytest.mark.parametrize("family", ["DistilBert", "Albert", "MPNet", "DebertaV2"])
def test_encoders_that_take_no_keys_from_outside_are_refused(tiny_recipe, family):
    loaded = other_family(tiny_recipe, small(f"{family}ForSequenceClassification", f"{family}Config"))
    with pytest.raises(MethodError, match=r"cannot be put before this model.*method=lora"):
        find.build("methods", "prefix", {}, Method).apply(loaded.model, loaded)


@torch.no_grad()
def test_a_decoder_with_a_head_for_labels_is_served_and_padding_does_not_show(tiny_recipe):
    loaded = other_family(tiny_recipe, small("LlamaForSequenceClassification", "LlamaConfig", num_key_value_heads=1))
    model = find.build("methods", "prefix", {}, Method).apply(loaded.model, loaded)
    both = scattered(model)(input_ids=TEXT, attention_mask=MASK).logits
    alone = model(input_ids=TEXT[1:, :4], attention_mask=MASK[1:, :4]).logits
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_a_text_at_the_limit_is_cut_as_many_tokens_earlier(tiny_recipe):
    _, task, loaded, _, model = prefixed(tiny_recipe, "text-classification", num_virtual_tokens=10)
    long = task.encode({"text": "good " * 100, "label": "good", "row": "1"}, loaded)
    assert long["length"] == 32 - 10, "the tiny encoder has 32 places"
    with torch.no_grad():
        task.predict(model, task.collate([long]), loaded)
    with pytest.raises(MethodError, match="at most 24"):
        prefixed(tiny_recipe, "text-classification", num_virtual_tokens=25)


@pytest.mark.parametrize(
    "options",
    [
        {"num_virtual_tokens": 0},
        {"init": "text"},
        {"init_text": "good"},
        {"prefix_projection": True, "init": "vocabulary"},
        {"head_learning_rate_ratio": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError):
        find.build("methods", "prefix", options, Method)
