"""Bugs that spoil a model without a word: the half of the catalogue (silent_bugs.py) that is about rows and tokens.

Each test is named after its entry. Tokens are written out by hand, and every task that reads text is asked.
"""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROWS, tiny_tree

from tunewright import find
from tunewright.contracts import Task
from tunewright.engine.packing import packed_collate
from tunewright.errors import DataError
from tunewright.models import tiny
from tunewright.models.generation import generate_ids
from tunewright.models.logprob import IGNORE
from tunewright.recipe import ModelSpec, Recipe
from tunewright.runs import checking
from tunewright.tasks.causal_lm import CausalLM
from tunewright.tasks.sft import Sft

TASKS = find.names("tasks")
CLASSIFYING = [n for n in TASKS if any(f.kind == "label" for f in find.find("tasks", n, Task).fields.values())]
READING = [n for n in TASKS if "image" not in find.find("tasks", n, Task).fields]
SPEAKING = [n for n in TASKS if find.find("tasks", n, Task).auto_class == "AutoModelForCausalLM"]
TURNS = ["sun", "good a", "rain", "bad b"]  # question, answer, question, answer
PROMPT = "{% if add_generation_prompt %}{{ 'A : ' }}{% endif %}"
TEMPLATES = {  # as families write them: what stands where is each one's own, the answers are the same
    "none": None,
    "marked": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q : ' + m['content'] + ' ' }}"
        "{% else %}{{ 'A : ' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}" + PROMPT
    ),
    "in brackets": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + 'Q ' + m['content'] + ' Q ' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "text after the end": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q : ' + m['content'] + ' ' }}"
        "{% else %}{{ 'A : ' + m['content'] + eos_token + ' . ' }}{% endif %}{% endfor %}" + PROMPT
    ),
    "no end": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q : ' + m['content'] + ' ' }}"
        "{% else %}{{ 'A : ' + m['content'] + ' ' }}{% endif %}{% endfor %}" + PROMPT
    ),
}  # fmt: skip


def test_there_are_tasks_of_each_kind():
    assert min(len(CLASSIFYING), len(READING), len(SPEAKING)) >= 2


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """`speaking(template)` -> an Sft base whose tokenizer has this template."""
    import transformers

    made = {}

    def make(name: str):
        if name not in made:
            folder = tiny.causal_lm(tmp_path_factory.mktemp("base"))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template = TEMPLATES[name]
            tokenizer.save_pretrained(folder)
            made[name] = Sft().load(ModelSpec(str(folder)))
        return made[name]

    return make


def conversation(*contents: str) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"row": "r", "where": "r", "conversation": turns}


def learnt(loaded, example) -> str:
    return loaded.processor.decode(example["input_ids"][example["labels"] != IGNORE])


# --------------------------------------------------------------------------- what is learnt
@pytest.mark.parametrize("name", TEMPLATES)
def test_c07_the_answers_are_found_whatever_marks_the_template_has(speaking, name):
    loaded = speaking(name)
    example = Sft().encode(conversation(*TURNS), loaded)
    assert learnt(loaded, example) == "good a </s> bad b </s>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_c12_every_answer_learns_its_end_also_where_the_template_has_none(speaking, name):
    loaded = speaking(name)
    example = Sft().encode(conversation(*TURNS), loaded)
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    ends = [i for i, token in enumerate(ids) if token == loaded.processor.eos_token_id and labels[i] != IGNORE]
    assert len(ends) == 2
    assert loaded.processor.eos_token_id in loaded.model.generation_config.eos_token_id
    assert any("closes no answer: </s> is put behind each" in note for note in loaded.notes) == (name == "no end")


@pytest.mark.parametrize("name", TASKS)
def test_c08_every_row_has_something_to_learn_from(prepared, name):
    ready, task, loaded = prepared(name)
    rows = task.rows(loaded, ready.data.train)
    assert len(rows) >= 40
    assert all(min(task.weights(task.collate([task.encode(r, loaded)])).values()) > 0 for r in rows)


def test_c08_documents_of_which_nothing_is_predicted_are_left_out_and_counted(tmp_path):
    """A tokenizer without marks: of a document of one token there is nothing to predict."""
    import transformers

    folder = tiny.causal_lm(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    task = CausalLM()
    loaded = task.load(ModelSpec(str(folder)))
    assert loaded.processor.bos_token_id is loaded.processor.eos_token_id is None
    records = [{"row": f"r{i}", "where": f"r{i}", "text": text} for i, text in enumerate(("the sun", "sun", "rain"))]
    assert [r["row"] for r in task.rows(loaded, records)] == ["r0"]
    assert "2 of 3 documents (r1 for one)" in loaded.notes[-1]
    with pytest.raises(DataError, match="no document has two tokens"):
        task.rows(loaded, records[1:])


@pytest.mark.parametrize("name", SPEAKING)
def test_c10_a_row_that_is_not_counted_as_cut_ends_with_its_end_token(prepared, name):
    """Long rows too: a document is divided and its last part ends it, an answer that is cut is counted."""
    ready, _, loaded = prepared(name)
    options = {"max_length": 15} | ({"on_long": "cut"} if "on_long" in type(ready.task).__dataclass_fields__ else {})
    task = find.build("tasks", name, options, Task)
    end, ended, cut = loaded.processor.eos_token_id, 0, 0
    rows = task.rows(loaded, [dict(r, where=r["row"]) for r in ready.data.train])
    last = {row["where"]: row for row in rows}  # of a document in parts the last one
    for row in last.values():
        example = task.encode(row, loaded)
        if example.get("truncated"):
            cut += 1
            assert example["length"] == 15
        else:
            ended += 1
            assert example["input_ids"][-1] == example["labels"][-1] == end
    assert ended >= 5, cut
    assert len(last) == ended + cut == len(ready.data.train)
    assert (len(rows) > len(last)) != (cut > 0), "some rows were long"


# ------------------------------------------------------------------------------ marks
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("name", READING)
def test_c13_the_start_token_stands_once_on_every_path(prepared, name, asked):
    """The tokenizers put it in front by themselves; templates and tasks must not do so again."""
    ready, task, loaded = prepared(name)
    tokenizer = loaded.processor
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    assert tokenizer("sun")["input_ids"][0] == start
    for record in ready.data.train:
        example = task.encode(record, loaded, target=not asked)
        for ids in [example[key].tolist() for key in ("input_ids", "prompt_ids") if key in example]:
            assert ids[0] == start
            assert ids.count(start) == 1


@pytest.mark.parametrize("name", ["none", "marked", "text after the end", "no end"])
def test_c13_a_template_that_writes_the_start_token_has_it_once(speaking, name):
    example = Sft().encode(conversation(*TURNS), speaking(name))
    assert example["input_ids"].tolist().count(2) == example["prompt_ids"].tolist().count(2) == 1


def test_c15_no_token_reaches_over_the_edge_between_question_and_answer(tmp_path):
    """A tokenizer that would join the line end before the answer with its first letter, if it saw both at once."""
    import transformers
    from tokenizers import Tokenizer, models

    letters = [*["<pad>", "<s>", "</s>"], *"abdgoQA:\n ", "\ng", "go", "\ngo"]
    merges = [("\n", "g"), ("g", "o"), ("\ng", "o")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, merges))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    tiny.causal_lm(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = Sft().load(ModelSpec(str(tmp_path)))
    example = Sft().encode(conversation("ab", "good"), loaded)
    prompt = example["prompt_ids"]
    assert torch.equal(example["input_ids"][: len(prompt)], prompt), "what is served is what was trained on"
    assert loaded.processor.convert_ids_to_tokens(example["input_ids"][len(prompt) :]) == ["go", "o", "d", "</s>"]
    at_once = loaded.processor("Q: ab\nA:\ngood</s>", add_special_tokens=False)["input_ids"]
    assert "\ngo" in loaded.processor.convert_ids_to_tokens(at_once)


def test_c16_texts_that_spell_control_tokens_are_counted(prepared):
    ready, task, loaded = prepared("text-classification")
    rows = [dict(ready.data.train[0], row="odd", text="good [SEP] day"), *ready.data.train[1:4]]
    assert task.rows(loaded, rows) == rows
    assert "1 of 4 training rows (odd for one)" in loaded.notes[-1]
    served = loaded.processor("good [SEP] day")["input_ids"]
    assert task.encode(rows[0], loaded)["input_ids"].tolist() == served, "trained on as a pipeline reads it"
    known = len(loaded.notes)
    task.rows(loaded, rows[1:])
    assert len(loaded.notes) == known


def test_c18_positions_begin_anew_with_every_document_of_a_packed_row():
    sizes = [9, 4, 3, 5, 2, 1]
    examples = [{"row": str(n), "input_ids": torch.full((n,), n), "labels": torch.full((n,), n)} for n in sizes]
    batch = packed_collate(examples)
    seen = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            assert labels[start] == IGNORE, "the last word of a neighbour predicts nothing"
            if ids[start]:
                assert ids[start:end].tolist() == [end - start] * (end - start)
                seen.append(end - start)
    assert sorted(seen) == sorted(sizes)


@pytest.mark.parametrize("asked", [None, 500])
@pytest.mark.parametrize("name", READING)
def test_c24_no_row_is_longer_than_the_positions_of_the_model_and_what_is_cut_is_said(tmp_path, name, asked):
    tree = tiny_tree(name, tmp_path, n=30)
    file = Path(tree["data"]["train"])
    long = " ".join("abcdefgh"[i % 8] for i in range(300))
    if file.suffix == ".csv":
        rows = list(csv.reader(file.open(newline="")))
        with file.open("w", newline="") as out:
            csv.writer(out).writerows([*rows, *([f"{long} {w}", *rows[1][1:]] for w in ("sun", "rain"))])
    else:
        extra = [{"prompt": f"{w} {long}", "completion": long} for w in ("sun", "rain")]
        file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in extra))
    tree["data"]["test"] = str(ROWS[{".csv": "text", ".jsonl": "conversation"}[file.suffix]](file.parent.parent, 20, 7))
    recipe = Recipe.of(tree | {"task": {"name": name, "max_length": asked}, "train": {"packing": False}})[0]
    ready = checking.prepare(recipe)
    task, loaded = checking.load(ready)
    steps = checking.planned_steps(ready, task, loaded)
    places = loaded.model.config.max_position_embeddings
    longest = 0
    for i in range(steps.per_epoch):
        for batch in steps[i]:
            longest = max(longest, batch["input_ids"].shape[1])
            with torch.no_grad():
                assert all(t.isfinite() for t in task.loss(loaded.model, batch, loaded).totals.values())
    assert longest <= places
    found = checking.check(recipe)
    told = found.get("truncated", {}).get("rows", 0) + found.get("left_out", {}).get("rows", 0)
    parts = [row for row in task.rows(loaded, ready.data.train) if " part " in row["row"]]
    assert told == 2 or (told == 0 and len({row["where"] for row in parts}) == 2)
    assert any(f"{places} tokens" in line for line in found["settings"])


@pytest.mark.parametrize("name", SPEAKING)
def test_c24_an_answer_ends_where_the_positions_of_the_model_end(tmp_path, prepared, name):
    """A model with a table of positions, asked at length: it must not read beyond its table."""
    import transformers

    _, _, other = prepared(name)
    config = transformers.GPT2Config(
        vocab_size=len(other.processor), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    other.processor.model_max_length = 1000
    other.processor.save_pretrained(tmp_path)
    options = {"max_new_tokens": 500} if "max_new_tokens" in find.find("tasks", name, Task).__dataclass_fields__ else {}
    task = find.build("tasks", name, options, Task)
    loaded = task.load(ModelSpec(str(tmp_path)))
    kind = next(iter(task.fields))
    texts = [" ".join("abcdefgh"[i % 8] for i in range(n)) for n in (2, 9, 40, 300)]
    ask = [t if kind == "text" else [{"role": "user", "content": t}] for t in texts]
    examples = [task.encode({"row": "r", "where": "r", kind: text}, loaded, target=False) for text in ask]
    prompts = [e["prompt_ids"] if "prompt_ids" in e else e["input_ids"] for e in examples]
    assert [prompt[0].item() for prompt in prompts] == [2] * 4
    assert len({len(prompt) for prompt in prompts[:2]}) == 2
    assert [len(prompt) for prompt in prompts[2:]] == [16, 16], "half of the model is left for an answer"
    together = task.predict(loaded.model.eval(), task.collate(examples), loaded)
    alone = [task.predict(loaded.model, task.collate([e]), loaded)[0] for e in examples]
    assert together == alone
    ids = generate_ids(loaded.model, loaded.processor, prompts, 500, ends=[len(other.processor)])
    assert [len(p) + len(new) for p, new in zip(prompts, ids, strict=True)] == [32] * 4


# ----------------------------------------------------------------------------- labels
def labelled(name: str, where: Path, labels: list[str], base: Path | None = None):
    """Ten rows of each label, in this order, prepared and loaded."""
    from PIL import Image

    tree = tiny_tree(name, where / "tiny")
    rows = where / "rows"
    rows.mkdir()
    if "image" in find.find("tasks", name, Task).fields:
        for i, label in enumerate(labels):
            (rows / label).mkdir()
            for k in range(10):
                Image.new("RGB", (20, 20), (20 * i, 20 * k, 99)).save(rows / label / f"{k}.png")
    else:
        rows = rows / "rows.csv"
        words = "abcdefghij"
        lines = [f"{words[i]} {words[k]} sun,{label}\n" for i, label in enumerate(labels) for k in range(10)]
        rows.write_text("text,label\n" + "".join(lines))
    tree["data"] = {"train": str(rows), "holdout": 0.2}
    ready = checking.prepare(Recipe.of(tree | ({"model": str(base)} if base else {}))[0])
    return ready, *checking.load(ready)


@pytest.mark.parametrize("name", CLASSIFYING)
def test_c21_two_classes_have_two_logits_also_on_a_base_that_was_a_regression(tmp_path, name):
    import transformers

    auto = getattr(transformers, find.find("tasks", name, Task).auto_class)
    base = tiny.MAKERS[find.find("tasks", name, Task).auto_class](tmp_path)
    keys = {"num_labels": 1, "problem_type": "regression", "ignore_mismatched_sizes": True}
    auto.from_pretrained(base, **keys).save_pretrained(base)
    assert transformers.AutoConfig.from_pretrained(base).num_labels == 1
    ready, task, loaded = labelled(name, tmp_path, ["0", "1"], base)
    config = loaded.model.config
    assert (config.num_labels, config.problem_type) == (2, "single_label_classification")
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train[:6]])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
    with torch.no_grad():
        logits = loaded.model.eval()(**inputs).logits
        (total,) = task.loss(loaded.model, batch, loaded).totals.values()
    assert logits.shape == (6, 2)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("labels", [["2", "1", "10"], ["1", "2", "3", "4"], ["e", "d", "c", "b", "a"]])
@pytest.mark.parametrize("name", CLASSIFYING)
def test_c22_c23_there_are_as_many_logits_as_classes_and_each_has_rows(tmp_path, name, labels):
    """Whatever number the labels begin with and whatever the base counted to."""
    ready, task, loaded = labelled(name, tmp_path, labels)
    natural = tuple(sorted(labels, key=lambda x: (len(x), x)))
    assert loaded.labels == natural
    assert loaded.model.config.id2label == dict(enumerate(natural))
    batch = task.collate([task.encode(r, loaded) for r in ready.data.train])
    assert set(batch["labels"].tolist()) == set(range(len(labels)))
    names = [natural[i] for i in batch["labels"].tolist()]
    assert names == [r["label"] for r in ready.data.train]
    (answer, *_) = task.predict(loaded.model.eval(), batch, loaded)
    assert tuple(answer["scores"]) == natural
