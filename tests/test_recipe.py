"""The recipe: what it refuses and how it says so, what it takes from other tools, and that it comes back as written.

Pure reading of YAML: no model, no data.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tunewright import find
from tunewright.contracts import Method
from tunewright.errors import Fault, RecipeError
from tunewright.recipe import ALIASES, SHORT_METHODS, Choice, DataSpec, EvaluateSpec, ModelSpec, Recipe, TrainSpec

MINIMAL = {"model": "org/base", "task": "text-classification", "data": "rows.csv", "method": "lora"}
LINES = "model: org/base\ntask: text-classification\ndata: rows.csv\n"


def of(**keys) -> Recipe:
    return Recipe.of(MINIMAL | keys)[0]


def read(folder: Path, text: str, *keys: str) -> Recipe:
    path = folder / "tickets.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.read(path, keys)[0]


def faults(**keys) -> list[Fault]:
    with pytest.raises(RecipeError) as caught:
        of(**keys)
    assert caught.value.exit_code == 2
    return list(caught.value.faults)


def refused(folder: Path, text: str, *keys: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *keys)
    return str(caught.value)


# --------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("keys", "where", "near"),
    [
        ({"train": {"learning_rat": 1e-3}}, "train.learning_rat", "learning_rate"),
        ({"learning_rat": 1e-3}, "learning_rat", "learning_rate"),
        ({"modle": "x"}, "modle", "model"),
        ({"lora_rnk": 4}, "lora_rnk", "lora_rank"),
        ({"output_dri": "x"}, "output_dri", "output_dir"),
        ({"data": {"train": "rows.csv", "holdot": 0.2}}, "data.holdot", "holdout"),
        ({"model": {"checkpoint": "x", "revison": "y"}}, "model.revison", "revision"),
        ({"evaluate": {"margn": 0.1}}, "evaluate.margn", "margin"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(keys, where, near):
    (fault,) = faults(**keys)
    assert fault.where == f"recipe: {where}"
    assert "unknown key" in fault.problem
    assert f'Did you mean "{near}"?' in fault.remedy


def test_a_key_unlike_any_other_is_refused_with_all_there_are():
    (fault,) = faults(train={"zzz": 1})
    assert fault.remedy == ""
    assert all(field.name in fault.expected for field in dataclasses.fields(TrainSpec))


def test_all_faults_come_in_one_pass():
    train = {"learning_rat": 1, "num_train_epochs": 0, "optim": "adma", "save_steps": "often"}
    found = faults(train=train, data={"train": "rows.csv", "holdout": 1.5}, seed=-1, modle="x")
    places = {fault.where.removeprefix("recipe: ") for fault in found}
    assert places == {
        "train.learning_rat", "train.num_train_epochs", "train.optim", "train.save_steps", "data.holdout", "seed",
        "modle",
    }  # fmt: skip


def test_everything_that_is_missing_is_named_with_a_line_to_add():
    with pytest.raises(RecipeError) as caught:
        Recipe.of({})
    assert [fault.where for fault in caught.value.faults] == [
        f"recipe: {k}" for k in ("model", "task", "data", "method")
    ]
    assert all("Add a line such as" in fault.remedy for fault in caught.value.faults)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "learning_rate", 3.0),
        ("train", "learning_rate", 0),
        ("train", "learning_rate", -1e-4),
        ("train", "learning_rate", float("nan")),
        ("train", "learning_rate", float("inf")),
        ("train", "learning_rate", 10**400),
        ("train", "num_train_epochs", 0),
        ("train", "num_train_epochs", 10**6),
        ("train", "max_steps", 0),
        ("train", "max_steps", 10**30),
        ("train", "per_device_train_batch_size", 0),
        ("train", "per_device_train_batch_size", -8),
        ("train", "gradient_accumulation_steps", 0),
        ("train", "warmup_steps", float("inf")),
        ("train", "warmup_steps", -1),
        ("train", "weight_decay", 1.5),
        ("train", "max_grad_norm", -1),
        ("train", "save_total_limit", 1),
        ("train", "early_stopping_patience", 0),
        ("data", "holdout", 1.5),
        ("data", "holdout", 0),
        ("data", "holdout", -0.1),
        ("evaluate", "margin", 1),
        ("evaluate", "margin", -0.02),
    ],
)
def test_an_impossible_value_is_refused_with_the_range(section, key, value):
    given = {"train": "rows.csv", key: value} if section == "data" else {key: value}
    (fault,) = faults(**{section: given})
    assert fault.where == f"recipe: {section}.{key}"
    assert fault.problem in ("impossible value", "wrong kind of value")
    assert fault.expected
    assert fault.got


@pytest.mark.parametrize(
    ("keys", "where", "expected"),
    [
        ({"train": {"learning_rate": "three"}}, "train.learning_rate", "a number"),
        ({"train": {"num_train_epochs": True}}, "train.num_train_epochs", "a number"),
        ({"train": {"per_device_train_batch_size": 2.5}}, "train.per_device_train_batch_size", "a whole number"),
        ({"train": {"per_device_train_batch_size": "eight"}}, "train.per_device_train_batch_size", "a whole number"),
        ({"train": {"optim": "adamx"}}, "train.optim", "adamw, adamw_8bit, sgd, adafactor"),
        ({"train": {"gradient_checkpointing": "maybe"}}, "train.gradient_checkpointing", "true or false"),
        ({"train": 3}, "train", "a mapping"),
        ({"model": 3}, "model", "one text, or a mapping"),
        ({"data": ["a.csv", "b.csv"]}, "data", "one text, or a mapping"),
        ({"data": {"train": "rows.csv", "columns": {"label": 3}}}, "data.columns", "a mapping"),
        ({"model": {"checkpoint": "x", "quantize": "nf8"}}, "model.quantize", "int8, nf4"),
        ({"model": {"checkpoint": "x", "revision": 12}}, "model.revision", "text"),
        ({"seed": 1.5}, "seed", "a whole number"),
        ({"seed": True}, "seed", "a whole number"),
        ({"seed": 2**31}, "seed", "2^31"),
        ({"output_dir": 3}, "output_dir", "a folder"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_the_right_one(keys, where, expected):
    (fault,) = faults(**keys)
    assert fault.where == f"recipe: {where}"
    assert expected in fault.expected
    assert fault.got


def test_a_fault_names_the_key_as_it_was_written(tmp_path):
    text = refused(tmp_path, LINES + "method: lora\nlr: 3.0\n")
    assert text.startswith('tickets.yaml, written as "lr": train.learning_rate: impossible value')


def test_a_fault_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    text = refused(tmp_path, LINES + "method: lora\n", "train.learning_rate=3.0")
    assert text.startswith("command line: train.learning_rate: impossible value")


def test_a_method_without_a_name_is_refused(tmp_path):
    assert "method.name: missing" in refused(tmp_path, LINES + "method: {r: 8}\n")


# ------------------------------------------------------------------------ YAML
@pytest.mark.parametrize("spelling", ["2e-4", "2.0e-4", "0.0002", "'2e-4'", "2E-4"])
def test_a_number_is_a_number_in_every_spelling(tmp_path, spelling):
    """YAML 1.1 reads 2e-4 as text, for want of a dot."""
    assert read(tmp_path, f"{LINES}method: lora\ntrain: {{learning_rate: {spelling}}}\n").train.learning_rate == 2e-4


def test_a_duplicate_key_is_refused_with_its_line(tmp_path):
    text = refused(tmp_path, LINES + "method: lora\nmodel: other\n")
    assert "tickets.yaml line 5" in text
    assert '"model" stands twice' in text
    text = refused(tmp_path, LINES + "method: lora\ntrain:\n  seed: 1\n  optim: sgd\n  optim: adamw\n")
    assert "tickets.yaml line 8" in text


def test_python_tags_are_refused_and_never_run(tmp_path):
    trap = tmp_path / "trapped"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        text = refused(tmp_path, f"model: {tag} [{trap}]\n")
        assert "tickets.yaml line 1" in text
        assert "python" in text
    assert not trap.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty, or not a mapping"),
        ("# only a comment\n", "empty, or not a mapping"),
        ("- model\n- task\n", "empty, or not a mapping"),
        ("just words", "empty, or not a mapping"),
        ("model: [\n", "not valid YAML"),
        ("model:\tx\n\ttask: y\n", "not valid YAML"),
        ("model: \x00\n", "not a YAML file"),
        ("? [a, b]\n: c\n", "is no name for a key"),
        ("? {a: b}\n: c\n", "is no name for a key"),
        ("2024-01-01: c\n", "is no name for a key"),
        ("1: c\n", 'unknown key "1"'),
    ],
)
def test_what_is_no_recipe_is_refused_by_file_name(tmp_path, text, expected):
    found = refused(tmp_path, text)
    assert expected in found
    assert "tickets.yaml" in found


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "photo.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RecipeError, match=r"photo\.yaml: not a YAML file"):
        Recipe.read(tmp_path / "photo.yaml")


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "tickets.yaml").write_text("")
    with pytest.raises(RecipeError, match=r'tickts\.yaml: no such recipe file.*Did you mean "tickets\.yaml"\?'):
        Recipe.read(tmp_path / "tickts.yaml")
    with pytest.raises(RecipeError, match=r"Recipes in .*: tickets\.yaml"):
        Recipe.read(tmp_path / "zzz")
    with pytest.raises(RecipeError, match=r"a folder, not a recipe.*tickets\.yaml"):
        Recipe.read(tmp_path)
    with pytest.raises(RecipeError, match="no such recipe file"):
        Recipe.read(tmp_path / "no" / "such" / "folder.yaml")


def test_a_section_with_nothing_beneath_has_its_defaults(tmp_path):
    recipe = read(tmp_path, LINES + "method: lora\ntrain:\nevaluate:\n  # margin: 0.05\n")
    assert recipe == of(data=recipe.data.train)


# ------------------------------------------------------- short forms and aliases
def test_short_forms_mean_the_same_as_long_ones():
    long = {
        "model": {"checkpoint": "org/base"},
        "task": {"name": "text-classification"},
        "data": {"train": "rows.csv"},
        "method": {"name": "lora"},
    }
    assert Recipe.of(long)[0] == of()
    assert Recipe.of(long)[0].digest() == of().digest()


OWN = {
    "model.checkpoint": "org/other",
    "model.quantize": True,
    "data.train": "other.csv",
    "data.holdout": 0.25,
    "method.name": "full",
    "method.r": 4,
    "method.lora_alpha": 7,
    "method.lora_dropout": 0.1,
    "method.target_modules": ["query"],
    "task.max_length": 99,
    "train.learning_rate": 1e-3,
    "train.num_train_epochs": 7,
    "train.per_device_train_batch_size": 5,
    "train.max_steps": 9,
    "train.optim": "sgd",
    "train.lr_scheduler_type": "linear",
    "train.warmup_steps": 0.2,
    "train.early_stopping_patience": 2,
    "train.gradient_checkpointing": True,
}


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_a_word_of_another_tool_is_accepted_and_recorded_as_what_it_became(tmp_path, alias):
    own = ALIASES[alias]
    section, _, key = own.partition(".")
    replaced = {"model": "", "data": "", "method": ""} if key in ("checkpoint", "train", "name") else {}
    tree = {k: v for k, v in MINIMAL.items() if not (k == section and k in replaced)} | {alias: OWN[own]}
    (tmp_path / "peer.yaml").write_text(yaml.safe_dump(tree))
    recipe = Recipe.read(tmp_path / "peer.yaml")[0]
    expected = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}.get(alias, OWN[own])
    found = recipe.tree()[section][key]
    assert Path(found).name == expected if key == "train" else found == expected
    assert recipe.came_from[own] == f'peer.yaml, written as "{alias}"'
    assert alias not in recipe.came_from


def test_there_are_aliases_for_every_key_in_this_list():
    assert len(ALIASES) >= 30
    assert set(ALIASES.values()) <= set(OWN)


def test_train_keys_may_stand_at_the_top(tmp_path):
    recipe = read(tmp_path, LINES + "method: lora\nlearning_rate: 1e-3\nnum_train_epochs: 2\n")
    assert (recipe.train.learning_rate, recipe.train.num_train_epochs) == (1e-3, 2)
    assert recipe.came_from["train.learning_rate"] == 'tickets.yaml, written as "learning_rate"'


def test_our_own_names_are_not_reported_as_aliases(tmp_path):
    recipe = read(tmp_path, LINES.replace("text-classification", "{name: text-classification, max_length: 9}")
                  + "method: {name: lora, lora_alpha: 3}\n")  # fmt: skip
    assert recipe.came_from["method.lora_alpha"] == "tickets.yaml"
    assert recipe.came_from["task.max_length"] == "tickets.yaml"


@pytest.mark.parametrize(
    ("more", "first", "second"),
    [
        ("method: lora\nlr: 1e-3\ntrain: {learning_rate: 1e-4}\n", "lr", "train.learning_rate"),
        ("method: lora\nlr: 1e-3\nlearning_rate: 1e-4\n", "learning_rate", "lr"),
        ("method: lora\nepochs: 1\ntrain: {num_epochs: 2}\n", "train.num_epochs", "epochs"),
        ("method: {name: lora, r: 4}\nlora_r: 8\n", "lora_r", "method.r"),
        ("method: lora\nmodel_name_or_path: other\n", "model_name_or_path", "model.checkpoint"),
        ("method: lora\nfinetuning_type: full\n", "finetuning_type", "method.name"),
    ],
)
def test_a_key_given_under_two_names_is_refused_with_both(tmp_path, more, first, second):
    text = refused(tmp_path, LINES + more)
    assert "given twice" in text
    assert first in text
    assert second in text


# ------------------------------------------------------------- short names of methods
@pytest.mark.parametrize("short", sorted(SHORT_METHODS))
def test_a_short_name_becomes_what_it_means_and_says_so(tmp_path, short):
    recipe = read(tmp_path, LINES + f"method: {short}\n")
    meant = SHORT_METHODS[short]
    tree = recipe.tree()
    assert {key: tree[section][key] for section, keys in meant.items() for key in keys} == {
        key: value for keys in meant.values() for key, value in keys.items()
    }
    assert recipe.came_from["method.name"] == f'tickets.yaml, meant by "{short}"'
    assert find.build("methods", recipe.method.name, recipe.method.options, Method)
    recipe.write(tmp_path / "resolved.yaml")
    assert f'meant by "{short}"' in (tmp_path / "resolved.yaml").read_text()
    assert Recipe.read(tmp_path / "resolved.yaml")[0] == recipe


def test_the_short_names_of_the_field_are_known():
    assert set(SHORT_METHODS) >= {
        "qlora", "dora", "gradual-unfreezing", "bitfit", "linear-probe", "transfer-learning",
    }  # fmt: skip
    assert not set(SHORT_METHODS) & set(find.names("methods"))


def test_options_beside_a_short_name_are_kept_and_contradictions_refused(tmp_path):
    recipe = read(tmp_path, LINES + "method: {name: dora, r: 4}\n")
    assert recipe.method == Choice("lora", {"r": 4, "use_dora": True})
    assert read(tmp_path, LINES + "method: {name: gradual_unfreezing}\n").method.name == "layers"
    text = refused(tmp_path, LINES + "method: {name: dora, use_dora: false}\n")
    assert '"dora" means method.use_dora=true' in text


# ------------------------------------------------------------------ overrides
def test_overrides_win_and_are_recorded(tmp_path):
    text = LINES + "method: {name: lora, r: 4}\ntrain: {learning_rate: 1e-4, num_train_epochs: 2}\n"
    recipe = read(tmp_path, text, "train.learning_rate=3e-4", "data.columns.label=topic", "method.r=16", "seed=7")
    assert recipe.train == TrainSpec(learning_rate=3e-4, num_train_epochs=2)
    assert recipe.data.columns == {"label": "topic"}
    assert recipe.method.options == {"r": 16}
    assert recipe.seed == 7
    assert recipe.came_from["train.learning_rate"] == "command line"
    assert recipe.came_from["train.num_train_epochs"] == "tickets.yaml"


def test_a_short_override_keeps_the_other_keys_of_its_section(tmp_path):
    text = LINES.replace("org/base", "{checkpoint: org/base, revision: abc}") + "method: lora\n"
    assert read(tmp_path, text, "model=org/other").model == ModelSpec("org/other", revision="abc")


@pytest.mark.parametrize("override", ["train.num_train_epochs=5", "epochs=5", "num_train_epochs=5", "train.epochs=5"])
@pytest.mark.parametrize("line", ["train: {num_train_epochs: 2}", "epochs: 2", "num_train_epochs: 2"])
def test_an_override_wins_whatever_name_either_uses(tmp_path, line, override):
    assert read(tmp_path, f"{LINES}method: lora\n{line}\n", override).train.num_train_epochs == 5


def test_another_method_leaves_the_options_of_the_old_one_behind(tmp_path):
    """`method=head` is the example that the command line's own help gives."""
    text = LINES + "method: {name: lora, r: 4, lora_alpha: 8}\n"
    assert read(tmp_path, text, "method=head").method.options == {}
    for order in (("method=head", "method.solver=steps"), ("method.solver=steps", "method=head")):
        assert read(tmp_path, text, *order).method.options == {"solver": "steps"}
    assert read(tmp_path, text, "method=lora").method.options == {"r": 4, "lora_alpha": 8}


def test_of_two_overrides_of_one_key_the_last_wins(tmp_path):
    assert read(tmp_path, LINES + "method: lora\n", "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("text", ["seed", "=3", "", "="])
def test_an_override_that_cannot_be_read_is_refused(tmp_path, text):
    assert f'command line: "{text}" cannot be read; expected section.key=value' in refused(
        tmp_path, LINES + "method: lora\n", text
    )


def test_keys_alone_make_a_recipe():
    keys = [
        "model=org/base",
        "task=text-classification",
        "data=rows.csv",
        "method=lora",
        "output_dir=runs/x",
        "lr=1e-3",
    ]
    recipe, output_dir = Recipe.from_keys(keys)
    assert output_dir == "runs/x"
    assert recipe.train.learning_rate == 1e-3
    assert recipe.came_from["train.learning_rate"] == 'command line, written as "lr"'


# ------------------------------------------------------------ digest and writing
FULL = {
    "model": {"checkpoint": "org/base", "revision": "abc", "dtype": "float32"},
    "task": {"name": "text-classification", "max_length": 64, "class_weights": {"good": 2.0, "bad": 1.0}},
    "data": {"train": "rows.csv", "test": "test.csv", "columns": {"text": "body"}, "group": "user"},
    "method": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
    "train": {"learning_rate": 2e-4, "num_train_epochs": 2.5, "early_stopping_patience": 3, "warmup_steps": 10},
    "evaluate": {"margin": 0.05},
    "seed": 5,
}


@pytest.mark.parametrize("tree", [MINIMAL, FULL], ids=["minimal", "full"])
def test_a_written_recipe_reads_back_equal(tmp_path, tree):
    recipe = Recipe.of(tree, folder=tmp_path)[0]
    recipe.write(tmp_path / "recipe.yaml")
    again = Recipe.read(tmp_path / "recipe.yaml")[0]
    assert again == recipe
    assert again.digest() == recipe.digest()
    again.write(tmp_path / "twice.yaml")
    once, twice = ((tmp_path / name).read_text() for name in ("recipe.yaml", "twice.yaml"))
    assert yaml.safe_load(once) == yaml.safe_load(twice)


@pytest.mark.parametrize(
    "text", ["a: b", "# no", "yes", "2e-4", "null", "'quoted'", "naïve ☃", "two\nlines", " ", "- x"]
)
def test_every_text_survives_being_written(tmp_path, text):
    recipe = of(data={"train": "rows.csv", "columns": {"label": text}}, task={"name": "t", "word": text})
    recipe.write(tmp_path / "recipe.yaml")
    again = Recipe.read(tmp_path / "recipe.yaml")[0]
    assert again.data.columns == {"label": text}
    assert again.task.options == {"word": text}


def test_the_written_recipe_spells_out_every_default_and_where_each_value_came_from(tmp_path):
    text = LINES + "method: {name: lora, r: 4}\nlr: 1e-3\ntrain: {optim: sgd}\n"
    read(tmp_path, text, "data.holdout=0.2").write(tmp_path / "recipe.yaml", {"seed": "a reason"})
    lines = {line.split(":")[0].strip(): line for line in (tmp_path / "recipe.yaml").read_text().splitlines()}
    for spec in (ModelSpec, DataSpec, TrainSpec, EvaluateSpec):
        for field in dataclasses.fields(spec):
            assert field.name in lines
    assert lines["learning_rate"].endswith('# tickets.yaml, written as "lr"')
    assert lines["optim"].endswith("# tickets.yaml")
    assert lines["checkpoint"].endswith("# tickets.yaml")
    assert lines["r"].endswith("# tickets.yaml")
    assert lines["holdout"].endswith("# command line")
    assert lines["revision"].endswith("# default")
    assert lines["weight_decay"].endswith("# default")
    assert lines["seed"].endswith("# a reason")


def test_values_given_in_python_are_not_called_defaults():
    recipe = Recipe.from_keys([], MINIMAL | {"train": {"optim": "sgd"}}, name="python")[0]
    assert recipe.came_from["train.optim"] == "python"
    assert "train.learning_rate" not in recipe.came_from


def write_tree(folder: Path, tree: dict) -> Recipe:
    folder.mkdir(parents=True)
    (folder / "rows.csv").write_text("text,label\n")
    (folder / "test.csv").write_text("text,label\n")
    (folder / "base").mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(tree | {"model": {**FULL["model"], "checkpoint": "base"}}))
    return Recipe.read(folder / "recipe.yaml")[0]


def test_the_digest_is_the_same_in_a_moved_folder_and_in_another_order(tmp_path):
    here, there = write_tree(tmp_path / "a", FULL), write_tree(tmp_path / "b" / "c", dict(reversed(FULL.items())))
    assert here.data.train != there.data.train
    assert here.digest() == there.digest()


def test_the_digest_does_not_see_where_the_run_goes_nor_how_a_number_is_spelt():
    assert of().digest() == Recipe.of(MINIMAL | {"output_dir": "elsewhere"})[0].digest()
    assert of(train={"num_train_epochs": 3}).digest() == of(train={"num_train_epochs": 3.0}).digest() == of().digest()
    whole, part = ({"name": "lora", "lora_dropout": value} for value in (0, 0.0))
    assert of(method=whole).digest() == of(method=part).digest()


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": 1},
        {"model": "org/base2"},
        {"model": {"checkpoint": "org/base", "revision": "abc"}},
        {"data": "rows2.csv"},
        {"data": {"train": "rows.csv", "holdout": 0.2}},
        {"data": {"train": "rows.csv", "test": "test.csv"}},
        {"method": "full"},
        {"method": {"name": "lora", "r": 4}},
        {"task": {"name": "text-classification", "max_length": 9}},
        {"train": {"learning_rate": 1e-3}},
        {"train": {"num_train_epochs": 4}},
        {"evaluate": {"margin": 0.03}},
    ],
)
def test_the_digest_changes_when_a_value_changes(keys):
    assert of(**keys).digest() != of().digest()


def test_relative_places_are_found_beside_the_recipe_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_tree(tmp_path / "a", FULL)
    assert recipe.data.train == str(tmp_path / "a" / "rows.csv")
    assert recipe.model.checkpoint == str(tmp_path / "a" / "base")
    assert read(tmp_path, LINES + "method: lora\n").model.checkpoint == "org/base"


def test_options_left_out_stand_as_comments_and_the_file_is_the_same_recipe(tmp_path):
    tree = {"model": "m", "data": "d.csv", "method": {"name": "lora", "r": 4}}
    recipe = Recipe.of(tree | {"task": {"name": "text-classification", "class_weights": {"a": 1.0, "b": 2.0}}})[0]
    options = {"task": {"max_length": None, "class_weights": {}}, "method": {"r": 4, "target_modules": "all-linear"}}
    recipe.write(tmp_path / "r.yaml", None, options)
    text = (tmp_path / "r.yaml").read_text()
    assert "    b: 2.0  # recipe\n  # max_length: null  # default\ndata:" in text
    assert '  r: 4  # recipe\n  # target_modules: "all-linear"  # default\ntrain:' in text
    assert Recipe.read(tmp_path / "r.yaml")[0].digest() == recipe.digest()
