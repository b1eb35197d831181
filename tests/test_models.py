"""Checkpoints: found or answered with what to do, opened whole or refused; log-probabilities and class metrics."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from tunewright.errors import ModelError
from tunewright.metrics.classification import macro_f1, score_class
from tunewright.models import classifier, load, tiny
from tunewright.models.logprob import causal_logprob, label_logprob
from tunewright.recipe import ModelSpec
from tunewright.tasks.image_classification import ImageClassification
from tunewright.tasks.text_classification import TextClassification


# ---------------------------------------------------------------------- finding
def test_a_misspelt_folder_is_answered_with_the_near_one(tmp_path):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ModelError, match='Did you mean "my-model"'):
        load.resolve(ModelSpec(str(tmp_path / "my-modle")))


def test_a_hub_id_that_is_nowhere_says_where_it_looked_and_what_to_do():
    with pytest.raises(ModelError, match=r"nobody/nothing.*cache \(.*pass its folder"):
        load.resolve(ModelSpec("nobody/nothing"))


@pytest.mark.parametrize(
    ("missing", "said"), [("config.json", "config.json is missing"), ("model.safetensors", "safet")]
)
def test_an_incomplete_folder_names_what_is_missing(tmp_path, missing, said):
    tiny.text_encoder(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match=said):
        load.resolve(ModelSpec(str(tmp_path)))


def test_pickled_weights_are_not_read(tmp_path):
    tiny.text_encoder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only safetensors are read|Only safetensors are read"):
        load.resolve(ModelSpec(str(tmp_path)))


def test_a_folder_without_a_tokenizer_says_what_it_has(tmp_path):
    tiny.text_encoder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=r"(?s)tokenizer.json.*config.json"):
        load.open_processor("AutoTokenizer", ModelSpec(str(tmp_path)))


def test_weights_missing_inside_the_body_are_refused_not_drawn_at_random(tmp_path):
    """A config that promises three layers over weights of two: elsewhere the third is random, with a warning."""
    tiny.text_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tokenizer = load.open_processor("AutoTokenizer", ModelSpec(str(tmp_path)))
    with pytest.raises(ModelError, match="weights of the body are missing"):
        classifier.open_classifier(
            "AutoModelForSequenceClassification", ModelSpec(str(tmp_path)), tokenizer, ["a", "b"]
        )


def test_a_checkpoint_of_another_shape_is_refused_in_words(tmp_path):
    tiny.image_encoder(tmp_path)
    with pytest.raises(ModelError, match="does not open as AutoModelForSequenceClassification"):
        load.open_checkpoint("AutoModelForSequenceClassification", ModelSpec(str(tmp_path)), None)


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("damage", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"id2label": 7}], ids=str)
def test_a_damaged_config_is_an_error_in_words(tmp_path, damage, kind):
    tiny.text_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | damage))
    spec = ModelSpec(str(tmp_path), quantize=kind)
    with pytest.raises(ModelError, match=f"model {tmp_path}"):
        TextClassification().load(spec, ["a", "b"])
    with pytest.raises(ModelError, match=f"model {tmp_path}"):
        load.open_checkpoint("AutoModelForSequenceClassification", spec, None)


def test_the_digest_follows_the_weights_and_not_the_place(tmp_path):
    one = tiny.text_encoder(tmp_path / "one")
    two = shutil.copytree(one, tmp_path / "two")
    assert load.weights_digest(one) == load.weights_digest(two)
    other = tiny.text_encoder(tmp_path / "other", hidden_size=32)
    assert load.weights_digest(other) != load.weights_digest(one)


# ------------------------------------------------------------------- classifiers
def test_the_bases_own_head_stays_where_it_speaks_the_labels(tmp_path):
    spec = ModelSpec(str(tiny.image_encoder(tmp_path)))
    loaded = classifier.open_classifier("AutoModelForImageClassification", spec, None, ["sand", "sea", "sky"])
    assert loaded.fresh == ()
    assert loaded.labels == ("sky", "sea", "sand"), "in the base's order"


def test_as_many_labels_of_other_names_start_a_new_head(tmp_path):
    spec = ModelSpec(str(tiny.image_encoder(tmp_path)))
    before = classifier.open_classifier("AutoModelForImageClassification", spec, None, [])
    loaded = classifier.open_classifier("AutoModelForImageClassification", spec, None, ["cat", "dog", "eel"])
    assert loaded.fresh == ("classifier.1",)
    assert not torch.equal(before.model.classifier[1].weight, loaded.model.classifier[1].weight)
    assert any("other names" in note for note in loaded.notes)


def test_zero_shot_cuts_a_text_where_the_position_table_ends(tmp_path):
    spec = ModelSpec(str(tiny.text_encoder(tmp_path)))  # 32 positions
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 10**30}))
    zero_shot = TextClassification()._zero_shot(spec, ["good", "bad"])
    long, cut = "sun good " * 40, "sun good " * 15  # 15 x 2 words and two markers
    answers = zero_shot.predict([{"text": text} for text in (long, cut)])
    assert answers[0]["scores"] == pytest.approx(answers[1]["scores"], abs=1e-6)


def test_a_base_stored_in_half_precision_is_compared_by_its_own_head_too(tmp_path):
    from PIL import Image

    spec = ModelSpec(str(tiny.image_encoder(tmp_path)), dtype="bfloat16")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "blue.png")
    task = ImageClassification()
    loaded = task.load(spec, ["skys", "sea"])
    baseline = task.baseline(spec, loaded, [])
    row = {"row": "1", "image": str(tmp_path / "blue.png")}
    assert baseline.name == "zero-shot", "these are words of the base"
    assert sum(baseline.predict([row])[0]["scores"].values()) == pytest.approx(1.0)


def test_balanced_weights_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    labels = ["a"] * 7 + ["b"] * 2 + ["c"]
    ours = classifier.balanced_weights([{"label": name} for name in labels])
    theirs = sklearn.compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    assert list(ours.values()) == pytest.approx(list(theirs))


# ----------------------------------------------------------------- log-probability
def test_label_logprob_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [1.0, 1.0]]])
    found = label_logprob(logits, torch.tensor([[1, -100]]))
    assert found.tolist() == [[pytest.approx(math.log(0.75)), 0.0]]


def test_label_logprob_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        label_logprob(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


def test_c19_causal_logprob_shifts_once():
    """A model that is sure the next token is the present one plus one costs nothing on 0 1 2 3, and much on 3 2 1 0."""

    class Counter(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            sure = torch.nn.functional.one_hot((input_ids + 1) % 5, 5) * 50.0
            return type("Out", (), {"logits": sure})()

    up, down = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[3, 2, 1, 0]])
    assert causal_logprob(Counter(), {"input_ids": up, "labels": up}).sum().item() == pytest.approx(0.0, abs=1e-4)
    assert causal_logprob(Counter(), {"input_ids": down, "labels": down}).sum().item() < -100


# ------------------------------------------------------------------------ metrics
def test_macro_f1_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "a"), ("b", "c"), ("a", "a")]
    theirs = sklearn.f1_score(*zip(*pairs, strict=True), average="macro")
    assert macro_f1(pairs) == pytest.approx(theirs)


def test_scores_of_one_row_by_hand():
    prediction = {"label": "a", "scores": {"a": 0.8, "b": 0.2}}
    assert score_class(prediction, "b") == {"accuracy": 0.0, "macro_f1": ("b", "a"), "log_loss": -math.log(0.2)}
    assert score_class(prediction, "unseen")["log_loss"] == pytest.approx(-math.log(1e-12))
