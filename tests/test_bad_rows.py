"""Bad input for models that speak, and numbers that cannot be: the second half of the table of bad inputs.

The numbers are rows of that table (docs/promises.md). Everything is found by `check`, before a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tree

from tunewright.errors import UserError
from tunewright.recipe import Recipe
from tunewright.runs import checking

GOOD = [{"prompt": f"good {w} {x}", "completion": f"very good {w}"} for w in "abcdefgh" for x in "ijk"]
TURNS = [{"role": "user", "content": "good a"}, {"role": "assistant", "content": "very good"}]
LABELLED = [{"text": f"{mood} {w}", "label": mood} for mood in ("good", "bad") for w in "abcdefghij"]


@pytest.fixture
def check(tmp_path):
    """`check(rows, ...)` -> what `tunewright check` finds for these rows beside a tiny base of the task."""

    def call(rows: list[Any], task: str = "sft", **keys: Any) -> dict[str, Any]:
        tree = tiny_tree(task, tmp_path)
        file = tmp_path / "d.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return checking.check(Recipe.of(tree | {"data": {"train": str(file), "holdout": 0.3}} | keys)[0])

    return call


@pytest.fixture
def refused(check):
    """The text of the error that `check` gives."""

    def call(rows: list[Any], *parts: str, **keys: Any) -> str:
        with pytest.raises(UserError) as caught:
            check(rows, **keys)
        text = str(caught.value)
        assert caught.value.exit_code == 2
        missing = [part for part in parts if part not in text]
        assert not missing, f"{missing} not in: {text}"
        return text

    return call


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


CHATS = [messages(TURNS[0] | {"content": f"good {c}"}, TURNS[1]) for c in "abcdefghij"]


def test_row_26_messages_that_are_a_string(refused):
    refused([*CHATS, {"messages": "hello"}], "d.jsonl line 11", "is no list of turns", "a text (hello)", "quarantine")


def test_row_43_a_text_with_nothing_to_read(refused):
    rows = [*LABELLED, {"text": "\u200b\u200b", "label": "good"}]
    refused(rows, "d.jsonl line 21", 'field "text"', "nothing that can be read", "\\u200b", task="text-classification")


def test_row_48_an_empty_file(refused):
    refused([], "d.jsonl", "empty (0 bytes)", "copied to its end")


def test_row_50_51_an_answer_that_is_empty_or_blank(refused):
    rows = [*GOOD, {"prompt": "a", "completion": ""}, {"prompt": "b", "completion": " \n"}]
    refused(rows, "d.jsonl line 25", "d.jsonl line 26", "answer in completion is empty", "quarantine")


def test_row_52_an_empty_question_is_counted(check):
    found = check([*GOOD, {"prompt": "", "completion": "very good"}])
    assert any("1 conversations have an empty question" in note for note in found["notes"])


def test_row_53_an_answer_that_is_a_number(refused):
    refused([*GOOD, {"prompt": "a", "completion": 5}], "d.jsonl line 25", "completion is no text", "a number (5)")


def test_row_54_a_conversation_without_the_assistant(refused):
    refused([*CHATS, messages(TURNS[0])], "d.jsonl line 11", "no turn of the assistant")


def test_row_55_a_role_with_a_slip(refused):
    refused([*CHATS, messages(TURNS[0] | {"role": "humann"}, TURNS[1])], "d.jsonl line 11", '"humann"')


def test_row_56_turns_of_another_format_under_messages(refused):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    refused([*CHATS, messages(*turns)], "d.jsonl line 11", "data.columns.conversations=messages")


def test_row_57_a_turn_without_content(refused):
    refused([*CHATS, messages(TURNS[0] | {"content": None}, TURNS[1])], "d.jsonl line 11", "null")


def test_row_58_no_turns_at_all(refused):
    refused([*CHATS, messages()], "d.jsonl line 11", "empty list")


def test_row_59_two_formats_in_one_file(refused):
    refused([*GOOD, CHATS[0]], "different formats", "d.jsonl line 25")


def test_row_60_a_row_that_does_not_fit_is_left_out_and_named(check):
    long = {"prompt": "good " * 100, "completion": "very good"}
    found = check([*GOOD, *[long | {"prompt": long["prompt"] + c} for c in "abcdefgh"]])
    left = found["left_out"]
    assert left["rows"] >= 1
    assert left["of"] == found["rows"]["train"]
    assert all(row.startswith("d.jsonl:") and int(row.partition(":")[2]) > len(GOOD) for row in left["ids"])
    assert any(f"Left out, longer than 64 tokens (task.on_long): {left['rows']}" in said for said in found["settings"])


def test_row_61_no_row_fits(refused):
    rows = [{"prompt": g["prompt"] + " good" * 80, "completion": "very good"} for g in GOOD]
    refused(rows, "no training row fits into 64 tokens", "task.max_length", "task.on_long=cut")


def test_row_62_nothing_but_copies_and_one_question_with_two_answers(check, refused):
    refused([GOOD[0]] * 24, "d.jsonl", "no test set can be held out", "24 rows")
    found = check([*GOOD, GOOD[0] | {"completion": "bad"}])
    assert any("d.jsonl line 25 repeats d.jsonl line 1" in note for note in found["notes"])


def test_row_63_a_column_that_nobody_reads_is_said(check):
    found = check([row | {"weight": 1.0} for row in GOOD])
    assert any("columns not used: weight" in note for note in found["notes"])


@pytest.mark.parametrize("rate", [0, -1e-3, "fast", 3.0])
def test_row_64_an_impossible_rate(refused, rate):
    refused(GOOD, "train.learning_rate", train={"learning_rate": rate})


def test_row_64_a_rate_as_yaml_writes_it_is_a_number(check):
    assert check(GOOD, train={"learning_rate": "1e-3"})["ok"]


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "num_train_epochs", "max_steps", "save_steps"])
def test_row_65_nothing_to_do(refused, key):
    refused(GOOD, f"train.{key}", "impossible value", train={key: 0})


@pytest.mark.parametrize(
    "text", ["a\u200bb good", "\u202egood\u202c", "good \x00 a", "\U0001f600 good", "\x1b[31mgood"]
)
def test_awkward_characters_train_like_any_other(check, text):
    found = check([*LABELLED, {"text": text, "label": "good"}], task="text-classification")
    assert found["rows"]["train"] + found["rows"]["test"] == 21


def test_a_file_and_a_model_that_are_both_wrong_are_told_in_one_pass(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\na,x\nb\n")
    recipe = {
        "model": str(tmp_path / "none"),
        "task": "text-classification",
        "method": "lora",
        "data": str(tmp_path / "d.csv"),
    }
    with pytest.raises(UserError) as caught:
        checking.check(Recipe.of(recipe)[0])
    assert {Path(f.where.split()[-1]).name for f in caught.value.faults} >= {"none"}
    assert len(caught.value.faults) >= 2
