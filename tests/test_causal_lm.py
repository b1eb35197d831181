"""Continued pre-training: nothing of a text is lost, costs are those of the model, what is forgotten is said."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import shared, tiny_tree
from safetensors.torch import load_file

from tunewright import find
from tunewright.contracts import Task
from tunewright.data.readers import text as reader
from tunewright.errors import UserError
from tunewright.recipe import ModelSpec, Recipe
from tunewright.runs import checking
from tunewright.runs.evidence.verdict import verdict
from tunewright.runs.prediction import open_run, single_record
from tunewright.runs.training import train
from tunewright.tasks.causal_lm import CausalLM, perplexity, windows


# ------------------------------------------------------------------------- reader
def write(path, text, **kwargs):
    path.write_text(text, **kwargs)
    return path


def test_rows_are_whole_paragraphs_named_by_their_line(tmp_path):
    table = reader.read(write(tmp_path / "a.txt", "one\ntwo\n\n" + "x" * 1995 + "\n \n\nthree\n"))
    assert [row.where for row in table.rows] == ["a.txt line 1", "a.txt line 4", "a.txt line 7"]
    assert [row.values["text"][:7] for row in table.rows] == ["one\ntwo", "xxxxxxx", "three"]


@pytest.mark.parametrize(
    "piece", ["word ", "line of some words\n", "x", "short\n\n", "long" * 700 + "\n\n", "\n \n", "tab\t"]
)
def test_no_letter_is_lost_and_no_row_is_empty_or_too_long(tmp_path, piece):
    whole = piece * 2000 if len(piece) < 100 else piece * 3
    table = reader.read(write(tmp_path / "a.txt", whole))
    texts = [row.values["text"] for row in table.rows]
    assert "".join("".join(texts).split()) == "".join(whole.split())
    assert all(text.strip() and len(text) <= reader.MOST for text in texts)
    assert len({row.row for row in table.rows}) == len(texts)
    assert bool(texts) != bool(table.faults)


def test_line_ends_of_windows_and_blank_files(tmp_path):
    table = reader.read(write(tmp_path / "a.txt", "one\r\ntwo\r\n\r\nthree\r\n", newline=""))
    assert [row.values["text"] for row in table.rows] == ["one\ntwo\n\nthree"]
    assert "blank lines only" in str(reader.read(write(tmp_path / "b.txt", "\n \n")).faults)


# ------------------------------------------------------------------------ windows
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 50])
def test_windows_predict_every_token_but_the_first_exactly_once(n):
    ids = torch.arange(n)
    parts = windows(ids, 8)
    assert all(1 <= len(part) <= 8 for part in parts)
    assert [int(i) for part in parts for i in part[1:]] == list(range(1, n))
    assert all(len(part) >= 2 for part in parts) or n == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tree = tiny_tree("causal-lm", tmp_path_factory.mktemp("tiny"))
    task = CausalLM()
    return tree, task, task.load(ModelSpec(tree["model"]))


def record(text: str) -> dict:
    return {"text": text, "row": "r", "where": "here", "extra": {}}


def test_a_document_begins_and_ends_with_its_marks_and_its_own_words_are_no_marks(tiny):
    _, task, loaded = tiny
    tokenizer = loaded.processor
    ids = task.encode(record("the sun </s> good <s>"), loaded)["input_ids"].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids[:-1]


def test_a_long_document_becomes_rows_that_hold_all_of_it(tiny):
    _, _, loaded = tiny
    task = CausalLM(max_length=16)
    long = record(" ".join("abcdefgh"[i % 8] for i in range(100)))
    rows = task.rows(loaded, [record("a b"), long])
    assert rows[0]["row"] == "r"
    assert rows[1]["row"] == "r part 1 of 7"
    whole = task._ids(long, loaded)
    parts = [task.encode(row, loaded)["input_ids"].tolist() for row in rows[1:]]
    assert parts[0] + [i for part in parts[1:] for i in part[1:]] == whole
    assert all(len(part) <= 16 for part in parts)


def test_the_loss_of_a_row_is_transformers_own_and_long_rows_are_summed_over_windows(tiny):
    _, _, loaded = tiny
    task = CausalLM(max_length=16)
    rows = [record("the sun a b c"), record(" ".join("abcdefgh"[i % 8] for i in range(40))), record("day")]
    batch = task.collate([task.encode(row, loaded) for row in rows])
    model = loaded.model.eval()
    with torch.no_grad():
        found = task.predict(model, batch, loaded)
        for row, prediction in zip(rows, found, strict=True):
            nats, tokens = 0.0, 0
            for part in windows(torch.tensor(task._ids(row, loaded)), 16):
                own = model(input_ids=part[None], labels=part[None]).loss  # a mean over len - 1 tokens
                nats, tokens = nats + own.item() * (len(part) - 1), tokens + len(part) - 1
            assert prediction["tokens"] == tokens
            assert prediction["loss"] == pytest.approx(nats / tokens, abs=1e-5)


def test_perplexity_pools_tokens_and_not_rows():
    assert perplexity([(math.log(2), 30), (math.log(8), 10)]) == pytest.approx(2 ** (30 / 40 + 3 * 10 / 40))


def test_without_a_target_the_answer_is_a_text(tiny):
    _, task, loaded = tiny
    examples = [task.encode(r, loaded, target=False) for r in (record("the sun"), record("rain a b c"))]
    assert loaded.processor.eos_token_id not in examples[0]["input_ids"]
    answers = task.predict(loaded.model.eval(), task.collate(examples), loaded)
    assert [set(answer) for answer in answers] == [{"text"}, {"text"}]


# ---------------------------------------------------------------------- in a run
def weights_after(recipe_of, folder, batch, accumulation):
    options = {
        "max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "optim": "sgd", "learning_rate": 0.1, "precision": "float32", "lr_scheduler_type": "constant",
        "warmup_steps": 0, "max_grad_norm": 0,
    }  # fmt: skip
    task = {"name": "causal-lm", "max_length": 8}  # rows of very different length, most of them cut
    run = train(recipe_of("causal-lm", task=task, train=options), folder, quiet=True, say=lambda text: None)
    return load_file(run.path / "model" / "model.safetensors")


def test_a_step_cut_into_micro_batches_is_the_same_step(tiny_recipe, tmp_path):
    whole = weights_after(tiny_recipe, tmp_path / "whole", 8, 1)
    for batch, accumulation in ((2, 4), (1, 8), (4, 2)):
        cut = weights_after(tiny_recipe, tmp_path / f"{batch}", batch, accumulation)
        assert max((whole[name] - cut[name]).abs().max().item() for name in whole) <= 1e-5


@pytest.mark.promise(13)
def test_what_it_forgot_is_measured_where_rows_are_given(tiny_recipe, tmp_path):
    other = write(
        tmp_path / "other.txt", "\n\n".join(f"{a} {b} 1 2 3 4 5 6 7 8 9" * 90 for a in "abcde" for b in "xyzw")
    )
    recipe = tiny_recipe(
        "causal-lm",
        evaluate={"general": {"numbers": str(other)}},
        train={"num_train_epochs": 10, "learning_rate": 0.01, "precision": "float32"},
    )
    run = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None)
    evidence = run.read_json("evidence.json")
    kept = [m for m in evidence["measures"] if m["about"] == "general"]
    assert [(m["name"], m["set"], m["n"]) for m in kept] == [("loss", "numbers", 20), ("perplexity", "numbers", 20)]
    assert kept[1]["base"] == pytest.approx(math.exp(kept[0]["base"]), rel=0.2)
    assert not any("forgot" in line for line in evidence["verdict"]["not_measured"])
    assert evidence["verdict"]["answer"] == "trade"
    assert "loss on numbers" in (run.path / "report.html").read_text()
    import pyarrow.parquet as pq

    splits = [line["split"] for line in pq.read_table(run.path / "scores.parquet").to_pylist()]
    assert (splits.count("test"), splits.count("general")) == (18, 20)
    text = open_run(run.path)([single_record(CausalLM(), "the sun")])[0]["text"]
    assert isinstance(text, str)
    json.dumps(text)


def test_general_rows_that_are_trained_on_are_left_out_and_faults_are_named(tiny_recipe, tmp_path):
    tree = tiny_recipe("causal-lm").tree()
    tree["evaluate"]["general"] = tree["data"]["train"]
    ready = checking.prepare(Recipe.of(tree)[0])
    assert len(ready.general["rows"]) == len(ready.data.test), "only what was held out is left"
    assert any("the model trains on them" in note for note in ready.data.notes)
    tree["evaluate"]["general"] = {"gone": str(tmp_path / "gone.txt")}
    with pytest.raises(UserError, match=r"evaluate\.general gone"):
        checking.prepare(Recipe.of(tree)[0])


@pytest.mark.promise(13)
def test_general_rows_serve_every_task(tiny_recipe, tmp_path):
    recipe = tiny_recipe("text-classification", train={"max_steps": 2})
    tree = recipe.tree()
    tree["evaluate"]["general"] = {"again": tree["data"]["train"]}
    run = train(Recipe.of(tree)[0], tmp_path / "run", quiet=True, say=lambda text: None)
    kept = [m["name"] for m in run.read_json("evidence.json")["measures"] if m["about"] == "general"]
    assert kept == [m.name for m in find.find("tasks", "text-classification", Task).metrics]


# ------------------------------------------------------------------------ verdict
def measured(difference: float, half: float, p: float, **more) -> dict:
    ends = [difference - half, difference + half]
    return {
        "name": "loss", "about": "task", "n": 100, "base": 3.0, "tuned": 3.0 + difference, "difference": difference,
        "ci95": ends, "p": p, "higher_is_better": False, "proportion": False,
    } | more  # fmt: skip


BETTER = measured(-0.5, 0.1, 1e-9)


def judged(*general) -> dict:
    return verdict(BETTER, None, 0.02, [], 0, [m | {"set": f"set{i}"} for i, m in enumerate(general)])


@pytest.mark.promise(13)
def test_better_here_and_worse_there_is_a_trade_and_the_headline_carries_both():
    found = judged(measured(0.4, 0.1, 1e-6))
    assert found["answer"] == "trade"
    assert "clearly better at your task" in found["sentence"]
    assert "worse on set0" in found["sentence"]
    assert "-0.5" in found["sentence"]
    assert "+0.4" in found["sentence"]


@pytest.mark.parametrize("kept", [measured(0.01, 0.005, 1e-3), measured(0.4, 0.5, 0.2), measured(-0.4, 0.1, 1e-6)])
def test_a_loss_within_the_margin_or_not_shown_or_a_gain_is_no_trade(kept):
    assert judged(kept)["answer"] == "better"


def test_many_sets_must_each_be_clearer():
    weak = measured(0.1, 0.09, 0.03)
    assert judged(weak)["answer"] == "trade"
    assert judged(weak, *[measured(0.0, 0.3, 0.9)] * 3)["answer"] == "better"


@pytest.mark.promise(13)
def test_worse_at_the_task_is_worse_whatever_was_kept():
    worse = measured(0.5, 0.1, 1e-9)
    assert verdict(worse, None, 0.02, [], 0, [measured(0.4, 0.1, 1e-6, set="x")])["answer"] == "worse"


# -------------------------------------------------------------------- real tokenizer
def test_the_real_story_model_costs_what_was_published(tmp_path):
    """shared/DATA.md: perplexity 5.54 a token on 150 stretches of about 600 characters of TinyStories."""
    base = shared("models/stories260k")
    text = shared("data/tinystories/stories.txt").read_text()
    task = CausalLM()
    loaded = task.load(ModelSpec(str(base)))
    rows = [record(" ".join(text[i : i + 600].split()[1:-1])) for i in range(0, 24000, 600)]
    with torch.no_grad():
        found = task.predict(loaded.model.eval(), task.collate([task.encode(r, loaded) for r in rows]), loaded)
    assert perplexity([(p["loss"], p["tokens"]) for p in found]) == pytest.approx(5.5, rel=0.3)
