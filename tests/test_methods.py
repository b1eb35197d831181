"""What is each method's own: the solved head against scikit-learn, LoRA against its formula, where things live."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tunewright import find
from tunewright.contracts import Method
from tunewright.engine.evaluate import predict_rows
from tunewright.errors import MethodError, RecipeError
from tunewright.models import probe
from tunewright.models.layout import layout_of, linear_names, max_positions, within
from tunewright.models.probe import solve
from tunewright.models.surgery import count_parameters
from tunewright.runs import checking
from tunewright.runs.training import train


# -------------------------------------------------------------------------- head
def blobs(n=120, width=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = rng.normal(0, 1.0, (classes, width))
    scale = np.resize([1, 10, 0.1, 3, 1], width)
    return rng.normal(0, 1, (n, width)) * scale + centres[labels] * scale, labels


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_solved_head_is_scikit_learns_logistic_regression(strength, weighted):
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs()
    weights = np.where(labels == 0, 3.0, 0.5) if weighted else np.ones(len(labels))
    scaled = (features - features.mean(0)) / features.std(0)
    oracle = sklearn.LogisticRegression(C=strength, max_iter=10_000, tol=1e-10).fit(scaled, labels, weights)
    tensors = torch.tensor(features), torch.tensor(labels), torch.tensor(weights)
    weight, bias = solve(*tensors, 3, strength)
    ours = torch.softmax(tensors[0] @ weight.T + bias, dim=-1).numpy()
    assert np.abs(ours - oracle.predict_proba(scaled)).max() < 1e-4


def test_more_numbers_than_rows_are_solved_alike():
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(n=40, width=90)
    scaled = (features - features.mean(0)) / features.std(0)
    oracle = sklearn.LogisticRegression(C=0.1, max_iter=10_000, tol=1e-10).fit(scaled, labels)
    tensors = torch.tensor(features), torch.tensor(labels), torch.ones(len(labels), dtype=torch.float64)
    weight, bias = solve(*tensors, 3, 0.1)
    ours = torch.softmax(tensors[0] @ weight.T + bias, dim=-1).numpy()
    assert np.abs(ours - oracle.predict_proba(scaled)).max() < 1e-4


def test_the_strength_is_chosen_on_scores_that_scikit_learn_finds_too():
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(width=30)
    ones = torch.ones(len(labels), dtype=torch.float64)
    chosen, scores = probe._choose_strength(torch.tensor(features), torch.tensor(labels), ones, 3)
    folds = probe._folds(torch.tensor(labels)).numpy()
    for strength, score in scores.items():
        total = 0.0
        for fold in range(probe.FOLDS):
            inside, outside = folds != fold, folds == fold
            mean, scale = features[inside].mean(0), features[inside].std(0)
            model = sklearn.LogisticRegression(C=strength, max_iter=10_000, tol=1e-10)
            model.fit((features[inside] - mean) / scale, labels[inside])
            logprob = model.predict_log_proba((features[outside] - mean) / scale)
            total -= logprob[np.arange(outside.sum()), labels[outside]].sum()
        assert score == pytest.approx(total / len(labels), rel=2e-3, abs=5e-5), strength
    assert chosen == min(scores, key=scores.get)
    assert len(scores) == 11


def test_the_solution_does_not_depend_on_the_order_of_rows():
    features, labels = (torch.tensor(x) for x in blobs())
    ones = torch.ones(len(labels), dtype=torch.float64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    one, two = solve(features, labels, ones, 3, 1.0), solve(features[order], labels[order], ones, 3, 1.0)
    torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-5)


def test_a_solved_head_says_how_and_leaves_the_trunk_bit_equal(tiny_recipe, tmp_path):
    recipe = tiny_recipe("image-classification", method="head")
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    said = json.loads((run.path / "solved.json").read_text())["text"]
    assert "cross-validated" in said
    assert not (run.path / "metrics.jsonl").exists(), "there were no steps"
    ready = checking.prepare(recipe)
    _, base = checking.load(ready)
    from tunewright.runs.prediction import open_run

    tuned = dict(open_run(run.path).model.state_dict())
    same = [n for n, t in base.model.state_dict().items() if torch.equal(t, tuned[n])]
    assert len(tuned) - len(same) == 2, "only the head's weight and bias differ"


def test_solved_beats_stepped_on_its_own_objective(tiny_recipe):
    """The optimum is the optimum: the training loss of the solved head is not above that of a stepped one."""
    losses = {}
    for solver in ("auto", "steps"):
        ready = checking.prepare(tiny_recipe("image-classification", method={"name": "head", "solver": solver}))
        task, loaded = checking.load(ready)
        steps = checking.planned_steps(ready, task, loaded)
        model = ready.method.apply(loaded.model, loaded)
        said = ready.method.start(model, task, loaded, steps.once_over())
        assert (said is None) == (solver == "steps")
        with torch.no_grad():
            model.eval()
            losses[solver] = sum(float(task.loss(model, b, loaded).totals["cross_entropy"]) for b in steps.once_over())
    assert losses["auto"] < losses["steps"], "solved against untrained"


# -------------------------------------------------------------------------- lora
def adapted(tiny_recipe, task="text-classification", **options):
    ready = checking.prepare(tiny_recipe(task, method={"name": "lora", **options}))
    task_object, loaded = checking.load(ready)
    return ready, task_object, loaded, ready.method.apply(loaded.model, loaded)


def test_lora_counts_r_times_in_plus_out_for_every_linear_layer(tiny_recipe):
    _, _, _loaded, model = adapted(tiny_recipe, r=3)
    shapes = [m.weight.shape for n, m in model.named_modules() if n.endswith("base_layer")]
    expected = sum(3 * (s[0] + s[1]) for s in shapes)
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n)
    assert len(shapes) == 2 * 6 + 1, "six in each of two blocks, and the pooler"
    assert count_parameters(model)[0] == expected + head


def test_lora_is_the_base_plus_scaled_product(tiny_recipe):
    _, _, _, model = adapted(tiny_recipe, r=4, lora_alpha=6)
    layer = next(m for n, m in model.named_modules() if n.endswith("attention.self.query"))
    torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + (6 / 4) * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_targets_that_match_nothing_are_named_with_what_there_is(tiny_recipe):
    with pytest.raises(MethodError, match=r"qurey.*match no module.*query"):
        adapted(tiny_recipe, target_modules=["qurey"])


def test_targets_may_be_last_segments(tiny_recipe):
    _, _, _, model = adapted(tiny_recipe, target_modules=["query", "value"])
    assert sum(n.endswith("base_layer") for n, _ in model.named_modules()) == 4


def test_the_reference_is_the_base_and_comes_back(tiny_recipe):
    ready, task, loaded, model = adapted(tiny_recipe)
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:3]])
    model.eval()
    with torch.no_grad():
        before = task.predict(model, batch, loaded)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        moved = task.predict(model, batch, loaded)
        with ready.method.reference(model, None) as base:
            restored = task.predict(base, batch, loaded)
        again = task.predict(model, batch, loaded)
    assert restored == before != moved
    assert again == moved


@pytest.mark.parametrize("options", [{"r": 0}, {"lora_dropout": 1.0}, {"target_modules": "everything"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError):
        find.build("methods", "lora", options, Method)


def test_depthwise_convolutions_are_left_out():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 8, 1), torch.nn.Linear(8, 2))
    assert linear_names(net) == ["1", "2"]


# ------------------------------------------------------------------------ layout
FAMILIES = {
    "BertForSequenceClassification": ("BertConfig", "classifier", "bert.embeddings.word_embeddings"),
    "RobertaForSequenceClassification": ("RobertaConfig", "classifier", "roberta.embeddings.word_embeddings"),
    "DistilBertForSequenceClassification": ("DistilBertConfig", "classifier", "distilbert.embeddings.word_embeddings"),
    "LlamaForSequenceClassification": ("LlamaConfig", "score", "model.embed_tokens"),
    "LlamaForCausalLM": ("LlamaConfig", "lm_head", "model.embed_tokens"),
    "ViTForImageClassification": ("ViTConfig", "classifier", None),
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", "classifier", None),
    "ResNetForImageClassification": ("ResNetConfig", "classifier", None),
}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "num_key_value_heads": 2, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_head_blocks_and_embedding_are_found_by_structure(name):
    import transformers

    config_name, head, embedding = FAMILIES[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config_name)(**SMALL))
    layout = layout_of(model)
    assert layout.head == head
    assert layout.embedding == embedding
    assert len(layout.blocks) >= 2
    assert not any(within(head, (block,)) for block in layout.blocks)


def test_position_tables_with_a_padding_index_hold_fewer_tokens():
    import transformers

    with torch.device("meta"):
        roberta = transformers.RobertaModel(transformers.RobertaConfig(**SMALL, max_position_embeddings=514))
        bert = transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=512))
    assert max_positions(roberta) == 512
    assert max_positions(bert) == 512


def test_evaluation_keeps_the_order_of_rows_whatever_their_length(tiny_recipe):
    ready = checking.prepare(tiny_recipe())
    task, loaded = checking.load(ready)
    examples = [task.encode(r, loaded) for r in ready.data.train]
    together = predict_rows(task, loaded.model, loaded, examples, batch_size=5)
    alone = [predict_rows(task, loaded.model, loaded, [e])[0] for e in examples]
    for one, two in zip(together, alone, strict=True):
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-6)
