"""Prompt tuning against independent truths: the hard prompt, word by word decoding, peft alone in another process."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_tree
from safetensors.torch import load_file
from torch import nn

from tunewright import find
from tunewright.contracts import Method
from tunewright.errors import MethodError, RecipeError
from tunewright.models.generation import generate_ids
from tunewright.models.layout import layout_of
from tunewright.models.surgery import count_parameters
from tunewright.recipe import Recipe
from tunewright.runs import checking
from tunewright.runs.prediction import open_run
from tunewright.runs.training import train


def prompted(tiny_recipe, task="causal-lm", seed=0, **options):
    """(method, task, loaded, base as it was, adapted model)"""
    ready = checking.prepare(tiny_recipe(task, method={"name": "prompt", **options}))
    task_object, loaded = checking.load(ready)
    base = copy.deepcopy(loaded.model).eval()
    torch.manual_seed(seed)
    return ready.method, task_object, loaded, base, ready.method.apply(loaded.model, loaded).eval()


def rows(model):
    return model.prompt_encoder["default"].embedding.weight


def scattered(model, seed=0):
    """The virtual tokens moved far, as after training."""
    with torch.no_grad():
        rows(model).copy_(torch.randn(rows(model).shape, generator=torch.Generator().manual_seed(seed)))
    return model


TEXT = torch.tensor([[2, 11, 12, 13, 14, 15], [2, 16, 17, 18, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


# ------------------------------------------------------------- the hard prompt
@torch.no_grad()
def test_c40_rows_of_the_vocabulary_are_the_hard_prompt_of_a_language_model(tiny_recipe):
    _, _, _, base, model = prompted(tiny_recipe, num_virtual_tokens=4)
    ids = torch.tensor([21, 8, 30, 8])
    rows(model).copy_(base.get_input_embeddings()(ids))
    hard = torch.cat([ids.expand(2, -1), TEXT], dim=1)
    expected = base(input_ids=hard, attention_mask=torch.cat([torch.ones(2, 4, dtype=torch.int64), MASK], 1)).logits
    found = model(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(found[MASK == 1], expected[:, 4:][MASK == 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_the_vocabulary_are_the_hard_prompt_of_an_encoder_its_head_reading_the_first_of_them(tiny_recipe):
    _, _, _, base, model = prompted(tiny_recipe, "text-classification", num_virtual_tokens=4)
    ids = torch.tensor([21, 8, 30, 8])
    rows(model).copy_(base.get_input_embeddings()(ids))
    hard = torch.cat([ids.expand(2, -1), TEXT], dim=1)
    expected = base(input_ids=hard, attention_mask=torch.cat([torch.ones(2, 4, dtype=torch.int64), MASK], 1)).logits
    assert (expected - base(input_ids=TEXT, attention_mask=MASK).logits).abs().max() > 1e-3, "the prompt matters"
    found = model(input_ids=TEXT, attention_mask=MASK).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------ what they begin as
def test_given_text_is_repeated_or_cut_and_the_note_says_so(tiny_recipe):
    for count, told in ((5, "3 tokens of init_text, repeated to 5"), (2, "3 tokens of init_text, cut to 2")):
        _, _, loaded, base, model = prompted(
            tiny_recipe, init="text", init_text="good sun day", num_virtual_tokens=count
        )
        ids = loaded.processor.convert_tokens_to_ids(["good", "sun", "day", "good", "sun"][:count])
        assert torch.equal(rows(model), base.get_input_embeddings().weight[ids])
        assert any(told in note for note in loaded.notes), loaded.notes


def test_the_vocabulary_means_ordinary_words_the_same_for_the_same_seed(tiny_recipe):
    _, _, loaded, base, model = prompted(tiny_recipe, num_virtual_tokens=40)
    table = base.get_input_embeddings().weight
    places = [int((table == row).all(dim=1).nonzero()) for row in rows(model)]
    assert not set(places) & set(loaded.processor.all_special_ids)
    assert len(set(places)) == 40, "no word twice while there are others"
    assert torch.equal(rows(prompted(tiny_recipe, num_virtual_tokens=40)[-1]), rows(model))
    assert not torch.equal(rows(prompted(tiny_recipe, seed=1, num_virtual_tokens=40)[-1]), rows(model))


def test_noise_is_as_wide_as_the_word_table(tiny_recipe):
    _, _, _, base, model = prompted(tiny_recipe, init="random", num_virtual_tokens=40)
    table = base.get_input_embeddings().weight
    assert rows(model).std().item() == pytest.approx(table.std().item(), rel=0.2)
    assert not any((table == row).all(dim=1).any() for row in rows(model))


# ---------------------------------------------------------------- called as before
@torch.no_grad()
def test_logits_are_those_of_the_text_whatever_is_padded(tiny_recipe):
    _, _, _, base, model = prompted(tiny_recipe)
    scattered(model)
    both = model(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits
    assert both.shape == base(input_ids=TEXT, attention_mask=MASK).logits.shape
    alone = model(input_ids=TEXT[1:, :4], attention_mask=MASK[1:, :4], use_cache=False).logits
    torch.testing.assert_close(both[1, :4], alone[0], atol=1e-5, rtol=1e-5)
    left, open_ = torch.tensor([[0, 0, 2, 16, 17, 18]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = model(input_ids=left, attention_mask=open_, use_cache=False).logits
    torch.testing.assert_close(padded[0, 2:], alone[0], atol=1e-5, rtol=1e-5)


PROMPTS = [[2, 11, 12, 13, 14], [2, 16, 17], [2], [2, 9, 8, 7, 6, 5, 4, 20], [2, 30], [2, 31, 32, 33], [2, 19, 21]]


@torch.no_grad()
def by_hand(model, ids, count):
    """Greedy, the whole sequence anew for every token."""
    ids = torch.tensor([ids])
    for _ in range(count):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_generate_is_decoding_word_by_word_for_every_batch_size(tiny_recipe, size):
    _, _, loaded, base, model = prompted(tiny_recipe)
    scattered(model)
    expected = [by_hand(model, ids, 6) for ids in PROMPTS]
    batches = [PROMPTS[i : i + size] for i in range(0, 7, size)]
    found = []
    for batch in batches:
        prompts = [torch.tensor(ids) for ids in batch]
        found += generate_ids(model, loaded.processor, prompts, 6, ends=[len(loaded.processor) + 1])
    assert found == expected
    assert found != [by_hand(base, ids, 6) for ids in PROMPTS], "the prompt matters"


@torch.no_grad()
def test_a_copy_answers_alike_and_a_state_dict_holds_no_hook(tiny_recipe):
    _, _, _, _, model = prompted(tiny_recipe)
    other = copy.deepcopy(model)
    scattered(other)
    assert not torch.equal(rows(other), rows(model))
    other.load_state_dict(model.state_dict())
    one, two = (m(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits for m in (model, other))
    assert torch.equal(one, two)
    assert one.shape[1] == TEXT.shape[1]


@torch.no_grad()
def test_the_reference_is_the_base_with_the_head_it_had_and_comes_back(tiny_recipe):
    method, _, _, base, model = prompted(tiny_recipe, "text-classification")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.5)
    moved = model(input_ids=TEXT, attention_mask=MASK).logits
    with method.reference(model, None) as reference:
        found = reference(input_ids=TEXT, attention_mask=MASK).logits
    assert torch.equal(found, base(input_ids=TEXT, attention_mask=MASK).logits)
    assert torch.equal(model(input_ids=TEXT, attention_mask=MASK).logits, moved)
    assert not torch.equal(moved, found)


def test_gradient_checkpointing_changes_no_gradient(tiny_recipe):
    found = []
    for checkpointing in (False, True):
        _, _, _, _, model = prompted(tiny_recipe)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits.square().sum().backward()
        found.append(rows(model).grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------ what trains
def test_rows_times_width_train_and_a_new_head_at_a_rate_of_its_own(tiny_recipe):
    assert count_parameters(prompted(tiny_recipe, num_virtual_tokens=5)[-1])[0] == 5 * 16
    method, _, loaded, _, model = prompted(tiny_recipe, "text-classification", num_virtual_tokens=5)
    assert count_parameters(model)[0] == 5 * 16 + 16 * 2 + 2
    rates = {n: (g["lr"], g["weight_decay"]) for g in method.groups(model, loaded, 0.3, 0.1) for n, _ in g["params"]}
    assert rates.pop("prompt_encoder.default.embedding.weight") == (0.3, 0.0)
    assert sorted(decay for _, decay in rates.values()) == [0.0, 0.1]
    assert [rate for rate, _ in rates.values()] == pytest.approx([3e-3, 3e-3])


# ------------------------------------------------------------------------- room
def test_a_text_at_the_limit_is_cut_as_many_tokens_earlier(tiny_recipe):
    _, task, loaded, _, model = prompted(tiny_recipe, "text-classification", num_virtual_tokens=10)
    long = task.encode({"text": "good " * 100, "label": "good", "row": "1"}, loaded)
    assert long["length"] == 32 - 10, "the tiny encoder has 32 places"
    assert loaded.processor.model_max_length == 22
    with torch.no_grad():
        assert (
            model(**{k: v for k, v in task.collate([long]).items() if "i" in k and "label" not in k})
            .logits.isfinite()
            .all()
        )


def test_leaving_room_twice_takes_it_once(tiny_recipe):
    method, _, loaded, _, _ = prompted(tiny_recipe, "text-classification", num_virtual_tokens=10)
    notes = list(loaded.notes)
    method.reserve(loaded)
    assert loaded.processor.model_max_length == 22
    assert loaded.notes == notes


def test_too_many_virtual_tokens_are_refused_with_how_many_fit(tiny_recipe):
    with pytest.raises(MethodError, match=r"leave 2 of the model's 32 places.*at most 24"):
        prompted(tiny_recipe, "text-classification", num_virtual_tokens=30)


def test_training_on_texts_at_the_limit_cuts_them_before_they_are_read(tmp_path):
    tree = tiny_tree("text-classification", tmp_path, n=40)
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"{'a ' * 40}{i % 9} {i // 9},{i % 2}\n" for i in range(40)))
    tree |= {"method": {"name": "prompt", "num_virtual_tokens": 10}, "train": {"max_steps": 2}}
    run = train(Recipe.of(tree)[0], tmp_path / "run", quiet=True, say=lambda text: None)
    assert run.read_json("data.json")["lengths"]["max"] == 22


# ----------------------------------------------------------------- what cannot be
def small(name, config_name, **config):
    """A tiny model of another family with the tiny tokenizer's vocabulary."""
    import transformers

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 60,
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "pad_token_id": 0, "embedding_size": 16,
        "max_position_embeddings": 32, "num_labels": 3, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config_name)(**(sizes | config))).eval()


def other_family(tiny_recipe, model: nn.Module):
    """`Loaded` with that model in the place of the tiny encoder."""
    _, loaded = checking.load(checking.prepare(tiny_recipe("text-classification")))
    loaded.model, loaded.layout, loaded.fresh = model, layout_of(model), ()
    return loaded


def test_a_decoder_whose_head_reads_the_last_token_is_refused(tiny_recipe):
    """peft hands it embeddings alone: it would take the last padding for the last word, without an error."""
    loaded = other_family(tiny_recipe, small("LlamaForSequenceClassification", "LlamaConfig"))
    with pytest.raises(MethodError, match=r"takes padding for one.*method=lora"):
        find.build("methods", "prompt", {}, Method).apply(loaded.model, loaded)


@pytest.mark.parametrize("family", ["DistilBert", "Albert", "Roberta", "MPNet", "DebertaV2", "Electra"])
@torch.no_grad()
def test_other_encoders_take_prompts_and_padding_does_not_show(tiny_recipe, family):
    loaded = other_family(tiny_recipe, small(f"{family}ForSequenceClassification", f"{family}Config"))
    model = find.build("methods", "prompt", {"num_virtual_tokens": 4}, Method).apply(loaded.model, loaded)
    both = model(input_ids=TEXT, attention_mask=MASK).logits
    alone = model(input_ids=TEXT[1:, :4], attention_mask=MASK[1:, :4]).logits
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_virtual_tokens": 0},
        {"init": "text"},
        {"init_text": "good"},
        {"init": "words"},
        {"head_learning_rate_ratio": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError):
        find.build("methods", "prompt", options, Method)


# --------------------------------------------------------------- without tunewright
ALONE = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tunewright":
            raise ImportError("tunewright is not here")

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import save_file
os.chdir(sys.argv[1])
there = {}
exec("\\n".join(json.load(open("usage.json"))["load"]), there)
model, ids = there["model"].eval(), torch.tensor(json.loads(sys.argv[2]))
mask = (ids != 0).long()
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=59)
assert "tunewright" not in sys.modules
save_file({"logits": logits.contiguous(), "text": text[:, ids.shape[1]:].contiguous()}, sys.argv[3])
"""


def test_the_lines_of_the_card_pad_and_generate_as_we_do_in_plain_peft(tiny_recipe, tmp_path):
    recipe = tiny_recipe("causal-lm", method="prompt", train={"max_steps": 20, "precision": "float32"})
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    left = [[0, 0, 0, 2, 16, 17], [2, 11, 12, 13, 14, 15]]
    words = [sys.executable, "-c", ALONE, str(run.path), json.dumps(left), str(tmp_path / "theirs.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    theirs, model = load_file(tmp_path / "theirs.safetensors"), open_run(run.path).model
    ids = torch.tensor(left)
    ours = model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).logits
    torch.testing.assert_close(theirs["logits"][ids != 0], ours[ids != 0], atol=1e-5, rtol=1e-4)
    assert theirs["text"].tolist() == [by_hand(model, [2, 16, 17], 6), by_hand(model, left[1], 6)]
