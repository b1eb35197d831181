"""The door: what every verb prints, what it answers to wrong words and wrong input, and that it opens at once."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import tiny_tree, write_image_rows, write_text_rows

import tunewright
from tunewright.cli import main

VERBS = ["check", "train", "evaluate", "predict", "report", "compare", "merge", "demo", "tasks", "methods"]
HEAVY = ["torch", "transformers", "numpy", "peft", "pyarrow", "huggingface_hub"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A text base, an image base, rows for both, a recipe, and a finished run."""
    folder = tmp_path_factory.mktemp("desk")
    text, image = (tiny_tree(f"{kind}-classification", folder / kind) for kind in ("text", "image"))
    for name, tree in (("text", text), ("image", image)):
        tree["method"] = "head"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"output_dir": str(folder / f"{name}-run")}))
    return folder


@pytest.fixture(scope="module")
def run(desk) -> Path:
    tunewright.train(desk / "text.yaml", quiet=True)
    return desk / "text-run"


@pytest.fixture
def no_model(monkeypatch):
    """Any attempt to load a model or its processor explodes."""
    import transformers

    def explode(*_, **__):
        raise AssertionError("a model was loaded before the input was looked at")

    for name in ("PreTrainedModel", "AutoTokenizer", "AutoImageProcessor"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", explode)


def python(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | env
    )


# ------------------------------------------------------------------ opens at once
def test_help_and_lists_import_nothing_heavy():
    commands = [["--help"], ["--version"], [], ["tasks"], ["methods", "--json"], ["chek"], ["train", "--agian"]]
    commands += [[verb, "--help"] for verb in VERBS]
    program = f"""
import sys
from tunewright.cli import main
for command in {commands!r}:
    main(command)
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")


def test_help_takes_at_most_ten_times_an_empty_start():
    def seconds(*words: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        return time.perf_counter() - began

    for _ in range(3):  # a busy machine may disturb one series, not three
        pairs = [(seconds("-c", "pass"), seconds("-m", "tunewright", "--help")) for _ in range(5)]
        empty, full = (statistics.median(side) for side in zip(*pairs, strict=True))
        if full <= 10 * empty:
            return
    pytest.fail(f"--help takes {full:.3f} s, an empty Python {empty:.3f} s")


def test_help_names_every_verb_and_goes_to_stdout(cli):
    for words in (["--help"], []):
        code, out, err = cli(*words)
        assert (code, err) == (0, "")
        assert all(f" {verb} " in out for verb in VERBS)
    assert cli("--version") == (0, f"tunewright {tunewright.__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(cli, verb):
    code, out, _ = cli(verb, "--help")
    assert code == 0
    assert f"usage: tunewright {verb}" in out
    assert "--json" in out


def test_tasks_and_methods_are_what_the_folders_hold(cli):
    home = Path(tunewright.__file__).parent
    for folder in ("tasks", "methods"):
        files = {p.stem.replace("_", "-") for p in (home / folder).glob("*.py") if p.stem != "__init__"}
        code, out, _ = cli(folder, "--json")
        assert code == 0
        entries = json.loads(out)
        assert {entry["name"] for entry in entries} == files
        assert len(files) >= 2
        assert all(len(entry["summary"]) > 20 for entry in entries)
        assert all(name in cli(folder)[1] for name in files)


# ------------------------------------------------------------------- wrong words
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chek", "x"], ['unknown verb "chek"', 'Did you mean "check"?']),
        (["zzz"], ['unknown verb "zzz"', "expected one of check, train"]),
        (["train", "x.yaml", "--agian"], ['unknown option "--agian"', 'Did you mean "--again"?']),
        (["check", "x.yaml", "--jsn"], ['unknown option "--jsn"', 'Did you mean "--json"?']),
        (["predict", "run", "text", "--bse", "x"], ['unknown option "--bse"', 'Did you mean "--base"?']),
        (["train", "x.yaml", "--aga"], ['unknown option "--aga"']),
        (["predict", "run", "text", "--out", "x"], ['unknown option "--out"', "--output"]),
        (["predict", "run"], ["required: INPUT"]),
        (["compare"], ["required: RUN"]),
        (["evaluate"], ["required: RUN"]),
        (["tasks", "extra"], ['unknown option "extra"']),
        (["--verion"], ["--verion"]),
        (["check"], ["no recipe given", "tunewright check RECIPE.yaml"]),
        (["check", "nope.yaml"], ["nope.yaml: no such recipe file"]),
    ],
)
def test_wrong_words_exit_2_and_say_what_is_meant(cli, words, said):
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert not [part for part in said if part not in err], err


@pytest.mark.parametrize(
    "words",
    [["chek"], ["train", "--agian"], ["--json", "tasks"], ["predict", "x"], ["check"], ["check", "nope.yaml"],
     ["compare", "nope", "none"], ["evaluate", "nope"], ["predict", "nope", "text"], ["report", "nope"],
     ["train", "nope.yaml"]],
)  # fmt: skip
def test_errors_are_one_json_document_too(cli, words):
    code, out, err = cli(*words, "--json")
    assert code == 2
    found = json.loads(out)
    assert set(found) == {"error", "faults"}
    assert set(found["faults"][0]) == {"problem", "where", "field", "expected", "got", "remedy"}
    assert found["faults"][0]["problem"] in err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["task=text-clasification"], ['unknown task "text-clasification"', 'Did you mean "text-classification"?']),
        (["method=loar"], ['unknown method "loar"', 'Did you mean "lora"?', "full, head, ia3, layers, lora"]),
        (["method=lora", "method.lora_alfa=3"], ['"lora_alfa"', 'Did you mean "lora_alpha"?', "method.lora_alfa"]),
        (["task.max_lenght=3"], ['"max_lenght"', 'Did you mean "max_length"?', "task.max_lenght"]),
        (["method=lora", "method.r=four"], ["method.r: wrong kind of value", "a whole number", "'four'"]),
        (["method=lora", "method.r=0"], ["r is 0"]),
        (["train.learning_rat=1"], ["train.learning_rat", 'Did you mean "learning_rate"?']),
        (["train.learning_rate=3.0"], ["command line: train.learning_rate: impossible value", "1e-7 to 1"]),
        (["train.per_device_train_batch_size=0"], ["per_device_train_batch_size", "got 0"]),
        (["task=no.such.module:Task"], ['"no.such.module:Task" cannot be imported']),
        (["task=tunewright.recipe:Recipe"], ["is not a Task"]),
        (["method.solver=guess"], ["method.solver", "one of auto, steps"]),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_nearest(cli, desk, no_model, keys, said):
    code, out, err = cli("check", desk / "text.yaml", *keys)
    assert (code, out) == (2, "")
    assert not [part for part in said if part not in err], err


def test_options_may_stand_anywhere(cli, desk, run):
    code, out, _ = cli("check", desk / "text.yaml", "--json", "seed=3")
    assert code == 0
    assert json.loads(out)["ok"]
    rows = write_text_rows(desk / "more.csv", 4, seed=5)
    assert json.loads(cli("evaluate", run, "--json", rows)[1])["verdict"]["answer"] == "no verdict"
    assert json.loads(cli("compare", run, "--json", run)[1])["n"] == 18


def test_a_text_may_look_like_an_option(cli, run):
    assert cli("predict", run, "-5 degrees, good day")[0] == 0
    assert cli("predict", run, "--", "--json")[0] == 0


# ---------------------------------------------------------------------- bad input
GOOD = "text,label\n" + "".join(f"sun {letter} day,good\nrain {letter} night,bad\n" for letter in "abcdefghijkl")


def case(folder: Path, name: str) -> list[str]:
    """Keys for the text recipe that point at one kind of bad input."""
    (folder / "good.csv").write_text(GOOD)
    train = f"data.train={folder / name}"
    test = ["data.train=" + str(folder / "good.csv"), f"data.test={folder / name}"]
    texts = {
        "empty.csv": "",
        "header.csv": "text,label\n",
        "nolabel.csv": "text,topic,area\n" + "".join(f"sun {n} {n} day,{n % 9},{n % 4}\n" for n in range(60)),
        "misspelt.csv": GOOD.replace("text,label", "text,lable"),
        "null.jsonl": '{"text": "sun", "label": "good"}\n{"text": null, "label": "bad"}\n',
        "blank.csv": GOOD.replace("sun c day", "   "),
        "unknown.csv": "text,label\nsun x,good\nrain x,bda\n",
        "oneclass.csv": "text,label\nsun a,good\nsun b,good\n",
        "broken.jsonl": '{"text": "sun", "label": "good"}\n{"text": "rain" "label": "bad"}\n',
        "ragged.csv": GOOD + "one, two, three,good\n",
        "latin.csv": "",
    }
    if name in texts:
        (folder / name).write_text(texts[name])
    if name == "latin.csv":
        (folder / name).write_bytes((GOOD + "café x,good\n").encode("latin-1"))
    return test if name == "unknown.csv" else [train]


BAD = {  # file: (place, field, parts of expected + got + remedy)
    "missing.csv": ("data.train", "", ["missing.csv", "good.csv"]),
    "empty.csv": ("empty.csv", "", ["0 bytes"]),
    "header.csv": ("header.csv", "", ["no rows", "text, label"]),
    "nolabel.csv": ("nolabel.csv", "label", ['a column "label"', "topic, area", "data.columns.label="]),
    "misspelt.csv": ("misspelt.csv", "label", ['Did you mean "lable"?', "data.columns.label=lable"]),
    "null.jsonl": ("null.jsonl line 2", "text", ["null", "a text", "data.on_bad_row=quarantine"]),
    "blank.csv": ("blank.csv line 6", "text", ["empty", "a text", "data.on_bad_row=quarantine"]),
    "unknown.csv": ("unknown.csv line 3", "label", ['"bda"', "bad, good", 'Did you mean "bad"?']),
    "oneclass.csv": ("oneclass.csv", "label", ["one class only", "two or more", '"good"']),
    "broken.jsonl": ("broken.jsonl line 2", "", ["no valid JSON", "an object such as", '{"text": "rain" "label"']),
    "ragged.csv": ("ragged.csv line 26", "", ["too many fields", "2 (text, label)", "quotation marks"]),
    "latin.csv": ("latin.csv line 26", "", ["0xe9", "UTF-8"]),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_bad_input_is_named_before_a_model_is_loaded(cli, desk, tmp_path, no_model, verb, name):
    place, field, parts = BAD[name]
    out_folder = tmp_path / "run"
    keys = [*case(tmp_path, name), f"output_dir={out_folder}"]
    code, out, err = cli(verb, desk / "text.yaml", *keys, "--json")
    assert code == 2
    (fault,) = json.loads(out)["faults"]
    assert fault["where"] == place
    assert fault["field"] == field
    said = " ".join(fault.values())
    assert not [part for part in parts if part not in said], said
    assert said.count("\n") == 0
    assert place in err
    assert not out_folder.exists()


def test_an_unreadable_picture_is_named_before_a_model_is_loaded(cli, desk, tmp_path, no_model):
    rows = write_image_rows(tmp_path / "photos", 12)
    (rows / "red" / "99.png").write_bytes((rows / "red" / "1.png").read_bytes()[:60])
    code, out, _ = cli("check", desk / "image.yaml", f"data.train={rows}", "--json")
    assert code == 2
    (fault,) = json.loads(out)["faults"]
    assert fault["where"] == "photos/red/99.png"
    assert fault["field"] == "image"
    assert "damaged" in fault["problem"]
    assert fault["expected"]
    assert fault["got"]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_delimiter_simply_works_and_is_said(cli, desk, tmp_path, separator):
    (tmp_path / "rows.csv").write_text(GOOD.replace(",", separator))
    code, out, _ = cli("check", desk / "text.yaml", f"data.train={tmp_path / 'rows.csv'}")
    assert code == 0
    assert "24 rows read, 24 kept" in out
    assert f'fields are separated by "{separator}"' in out


def test_faults_of_recipe_data_method_and_model_come_in_one_pass(cli, desk, tmp_path, no_model):
    keys = ["train.learning_rat=1", "train.num_train_epochs=0", "modle=x", *case(tmp_path, "blank.csv"),
            "method.solver=guess", "model.checkpoint=./nowhere"]  # fmt: skip
    code, out, err = cli("train", desk / "text.yaml", *keys, "--json")
    assert code == 2
    places = [fault["where"] for fault in json.loads(out)["faults"]]
    for part in (
        "train.learning_rat",
        "train.num_train_epochs",
        "modle",
        "blank.csv line 6",
        "method.solver",
        "nowhere",
    ):
        assert [place for place in places if part in place], part
    assert len(places) == 6
    assert "6 faults" in err


def test_more_faults_than_can_be_read_are_counted(cli, desk, tmp_path, no_model):
    (tmp_path / "rows.csv").write_text("text,label\n" + " ,good\n" * 50)
    code, out, err = cli("check", desk / "text.yaml", f"data.train={tmp_path / 'rows.csv'}", "--json")
    assert code == 2
    assert len(json.loads(out)["faults"]) >= 50
    assert "and 31 more like these" in err
    assert len(err.splitlines()) < 25


# ---------------------------------------------------------------------- the base
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json is missing", "expected a folder with config.json"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no *.safetensors file", "got a folder with config.json"]),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ["no *.safetensors file", "pytorch_model.bin", "can run code", "Convert it"],
        ),
        (lambda f: (f / "config.json").write_text("{"), ["config.json: not valid JSON"]),
        (lambda f: (f / "config.json").write_text("{}"), ["config.json", "model_type"]),
        (
            lambda f: [p.unlink() for p in f.iterdir()],
            ["config.json is missing", "no *.safetensors file", "nothing in it"],
        ),
    ],
    ids=["no-config", "no-weights", "only-bin", "broken-config", "no-model-type", "empty-folder"],
)
def test_a_folder_that_is_no_checkpoint_is_named_before_it_is_loaded(cli, desk, tmp_path, no_model, damage, said):
    shutil.copytree(desk / "text" / "base", tmp_path / "copy")
    damage(tmp_path / "copy")
    code, _, err = cli("check", desk / "text.yaml", f"model={tmp_path / 'copy'}")
    assert code == 2
    assert not [part for part in [*said, str(tmp_path / "copy")] if part not in err], err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 500), "the weights are damaged"),
        (lambda f: os.truncate(f / "model.safetensors", 0), "the weights are damaged"),
        (lambda f: (f / "config.json").write_text('{"model_type": "zebra"}'), 'knows no model type "zebra"'),
        (lambda f: (f / "tokenizer.json").write_text("{"), "Tokenizer"),
    ],
    ids=["cut-off", "empty", "unknown-type", "broken-tokenizer"],
)
def test_a_damaged_checkpoint_is_the_users_to_mend(cli, desk, tmp_path, damage, said):
    shutil.copytree(desk / "text" / "base", tmp_path / "copy")
    damage(tmp_path / "copy")
    code, _, err = cli("check", desk / "text.yaml", f"model={tmp_path / 'copy'}")
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_folder_that_is_not_there_is_named_with_the_nearest(cli, desk, no_model, monkeypatch):
    assert 'Did you mean "base"?' in cli("check", desk / "text.yaml", f"model={desk / 'text' / 'bsae'}")[2]
    monkeypatch.chdir(desk)
    assert 'Did you mean "text/base"?' in cli("check", desk / "text.yaml", "model=text/bsae")[2]


def test_a_hub_id_without_a_hub_is_answered_within_five_seconds(desk):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and never listened on: connections are refused
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
        words = [sys.executable, "-m", "tunewright", "check", str(desk / "text.yaml"), "model=nobody/nothing", "--json"]

        def start(**more: str) -> tuple[float, subprocess.CompletedProcess[str]]:
            began = time.perf_counter()
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=env | more)
            return time.perf_counter() - began, done

        # against the same start with the hub switched off: how long imports take on a busy machine is not the question
        pairs = [(start(), start(HF_HUB_OFFLINE="1")) for _ in range(2)]
        done = pairs[0][0][1]
    assert min(online[0] - offline[0] for online, offline in pairs) < 5
    assert done.returncode == 2
    (fault,) = json.loads(done.stdout)["faults"]
    assert fault["where"] == 'model "nobody/nothing"'
    assert str(Path("~/.cache/huggingface/hub").expanduser()) in fault["problem"]
    assert "cannot be reached" in fault["problem"]
    assert "model=/path/to/folder" in fault["remedy"]


def test_a_network_that_swallows_connections_does_not_hold_us_up(monkeypatch):
    from tunewright.errors import ModelError
    from tunewright.models import load
    from tunewright.recipe import ModelSpec

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(load, "_cached", lambda name, revision: None)
    monkeypatch.setattr(load, "_connect", lambda endpoint: time.sleep(20))
    began = time.perf_counter()
    with pytest.raises(ModelError, match="did not answer"):
        load.resolve(ModelSpec("nobody/nothing"))
    assert time.perf_counter() - began < 3.5


def test_a_hub_that_connects_and_stays_silent_does_not_hold_us_up(monkeypatch):
    import huggingface_hub

    from tunewright.errors import ModelError
    from tunewright.models import load
    from tunewright.recipe import ModelSpec

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(load, "_cached", lambda name, revision: None)
    monkeypatch.setattr(load, "_connect", lambda endpoint: time.sleep(1))  # its time counts too
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: time.sleep(20))
    began = time.perf_counter()
    with pytest.raises(ModelError, match="did not answer within 3 seconds"):
        load.resolve(ModelSpec("nobody/nothing"))
    assert time.perf_counter() - began < load.HUB_SECONDS + 1


# ------------------------------------------------------- one document, exit codes
def test_every_verb_prints_one_json_document(cli, desk, run, monkeypatch):
    from tunewright.uses import demo

    monkeypatch.setattr(demo, "demo", lambda out, say: {"text": str(out)})
    rows = write_text_rows(desk / "some.csv", 20, seed=9)
    image = ["train", desk / "image.yaml"]
    commands = {
        "check": ["check", desk / "text.yaml"], "train": image, "trained already": image,
        "evaluate": ["evaluate", run], "evaluate a file": ["evaluate", run, rows], "predict": ["predict", run, "sun"],
        "predict a file": ["predict", run, rows], "report": ["report", run], "compare": ["compare", run, run],
        "merge": ["merge", run, "--out", desk / "merged"],
        "demo": ["demo", "--out", desk / "demo"], "tasks": ["tasks"], "methods": ["methods"],
    }  # fmt: skip
    assert {words[0] for words in commands.values()} == set(VERBS)
    for name, words in commands.items():
        code, out, err = cli(*words, "--json")
        assert code == 0, (name, err)
        assert out.endswith("\n"), name
        assert "\n" not in out[:-1], name
        json.loads(out)


def test_check_says_what_will_be_trained_on(cli, desk):
    code, out, _ = cli("check", desk / "text.yaml")
    assert code == 0
    for part in ("60 rows read, 60 kept", "42 train", "18 test", "bad 21, good 21", "of 42 rows are cut",
                 "Texts are cut at", "[CLS]", "18 held-out rows", "Nothing stands in the way"):  # fmt: skip
        assert part in out, part
    found = json.loads(cli("check", desk / "text.yaml", "--json")[1])
    assert found["rows"] == {"train": 42, "validation": 0, "test": 18}
    assert found["trainable_parameters"] < found["total_parameters"]
    assert "e+0" not in cli("check", desk / "text.yaml", "method=full")[1]


def test_check_takes_no_step_and_leaves_nothing_behind(cli, desk, tmp_path):
    out = tmp_path / "run"
    assert cli("check", desk / "text.yaml", f"output_dir={out}")[0] == 0
    assert not out.exists()


def test_an_interrupted_command_exits_130(cli, desk, monkeypatch):
    from tunewright.runs import checking

    def interrupt(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "check", interrupt)
    code, out, err = cli("check", desk / "text.yaml")
    assert (code, out) == (130, "")
    assert "Interrupted" in err
    code, out, _ = cli("check", desk / "text.yaml", "--json")
    assert code == 130
    assert json.loads(out)["error"] == "KeyboardInterrupt"


def test_ctrl_c_while_training_exits_130_and_leaves_a_checkpoint_to_continue_from(desk, tmp_path):
    out = tmp_path / "run"
    keys = ["method=full", "train.max_steps=100000", "train.save_steps=2", "train.logging_steps=1", f"output_dir={out}"]
    words = [sys.executable, "-m", "tunewright", "train", str(desk / "text.yaml"), *keys]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "000004").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command continues from" in err
    assert not (out / "error.txt").exists()
    assert not (out / "evidence.json").exists()
    assert list((out / "checkpoints").glob("*/MANIFEST.json"))


def test_our_own_fault_exits_1_with_the_lines_to_report(cli, desk, monkeypatch):
    from tunewright.runs import checking

    def fail(recipe):
        raise ZeroDivisionError("ours \x1b[31m")

    monkeypatch.setattr(checking, "check", fail)
    code, out, err = cli("check", desk / "text.yaml", "--json")
    assert code == 1
    assert json.loads(out)["error"] == "ZeroDivisionError"
    assert "Traceback" in err
    assert "not of your input" in err
    assert "\x1b" not in err


# ------------------------------------------------------------- what reaches a terminal
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r"


def tame(text: str) -> bool:
    return not [c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_control_characters_of_the_data_do_not_reach_the_terminal(cli, desk, tmp_path, more):
    rows = [{"text": f"{EVIL} sun {letter}", "label": f"good{EVIL}"} for letter in "abcdefghij"]
    rows += [{"text": f"{EVIL} rain {letter}", "label": f"bad{EVIL}", f"x{EVIL}": 1} for letter in "abcdefghij"]
    file = tmp_path / f"rows{EVIL.replace(chr(13), '')}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = cli("check", desk / "text.yaml", f"data={file}", *more)
    assert code == 0, err
    assert tame(out + err)
    assert "owned" in out
    if more:
        assert any(EVIL.strip() in name for name in json.loads(out)["labels"]["train"])
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"text": None, "label": EVIL}) + "\n" + EVIL)
    code, out, err = cli("check", desk / "text.yaml", f"data={file}", *more)
    assert code == 2
    assert tame(out + err)
    assert tame("".join(cli("check", f"{EVIL}.yaml", *more)[1:]))
    assert tame("".join(cli(EVIL, *more)[1:]))


def test_labels_that_the_terminal_cannot_spell_are_no_fault(desk, tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text(GOOD.replace("good", "güt ☃"), encoding="utf-8")
    words = ["check", str(desk / "text.yaml"), f"data={tmp_path / 'rows.csv'}"]
    for more in (["--json"], []):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([*words, *more]) == 0
        stdout.flush()
        text = stdout.buffer.getvalue().decode("ascii")
        assert "güt ☃" in json.loads(text)["labels"]["train"] if more else "g\\xfct \\u2603" in text


def test_a_closed_stdout_is_no_fault(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)  # `tunewright tasks >&-`
    assert main(["tasks"]) == 0
    assert main(["tasks", "--json"]) == 0
    assert capsys.readouterr().err == ""


# ------------------------------------------------------- values that cannot be meant
@pytest.mark.parametrize("weights", ["{goood: 2.0}", "{good: -1.0, bad: 2.0}", "{good: 0.0, bad: 0.0}"])
def test_class_weights_that_cannot_be_meant_are_refused(cli, desk, weights):
    assert cli("check", desk / "text.yaml", f"task.class_weights={weights}")[0] == 2


def test_a_base_stored_in_bfloat16_can_be_tuned(cli, desk, tmp_path):
    keys = ["method=lora", "model.dtype=bfloat16", "train.max_steps=2", f"output_dir={tmp_path / 'run'}"]
    assert cli("train", desk / "text.yaml", *keys)[0] == 0


@pytest.mark.parametrize("alpha", [0, -4])
def test_a_lora_alpha_that_does_nothing_is_refused(cli, desk, alpha):
    assert cli("check", desk / "text.yaml", "method=lora", f"method.lora_alpha={alpha}")[0] == 2


def test_an_empty_text_in_a_table_of_one_column_is_not_dropped_in_silence(cli, run, tmp_path):
    (tmp_path / "new.csv").write_text('text\nsun\n""\nrain\n')
    assert cli("predict", run, tmp_path / "new.csv")[0] == 2
