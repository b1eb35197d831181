"""Opening data, a recipe, a template or a model runs nothing, reads nothing outside, connects nowhere; nothing leaks.

The payloads are those that were seen to work elsewhere (docs/facts.md), and their cousins.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_tree

from tunewright import find
from tunewright.contracts import Task
from tunewright.data import records
from tunewright.errors import ModelError, RecipeError
from tunewright.models import template, tiny
from tunewright.models.load import open_checkpoint, open_config
from tunewright.recipe import DataSpec, ModelSpec, Recipe

SOURCE = Path(__file__).parents[1] / "src" / "tunewright"
IMAGE = find.find("tasks", "image-classification", Task).fields
TEXT = find.find("tasks", "text-classification", Task).fields


# --------------------------------------------------------------------- our own code
FORBIDDEN = {
    "pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "pty",
}  # fmt: skip


def test_no_module_of_ours_can_read_code_as_data():
    """No pickle, no torch.load, no eval, no shell; only safe YAML."""
    seen = 0
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {n.partition(".")[0] for n in names} & FORBIDDEN, path
            if isinstance(node, ast.Call):
                seen += 1
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "os.system", "os.popen", "yaml.unsafe_load"), path
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("shell", "False") == "False", path
                assert keywords.get("allow_pickle", "False") == "False", path
                assert keywords.get("trust_remote_code", "False") == "False", path
                assert called != "yaml.load" or keywords["Loader"] == "_Loader", path
    assert seen > 1000


# -------------------------------------------------------------------------- models
class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.promise(14)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path, name, measured):
    base, mark = tiny.text_encoder(tmp_path / "base"), tmp_path / "executed"
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ModelError, match=r"safetensors"):
        open_checkpoint("AutoModelForSequenceClassification", ModelSpec(str(base)), None)
    measured(14, got=int(not mark.exists()))
    assert not mark.exists()


@pytest.mark.promise(14)
def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path, measured):
    base, mark = tiny.text_encoder(tmp_path / "base"), tmp_path / "executed"
    (base / "modeling_evil.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    config = json.loads((base / "config.json").read_text())
    for key in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"):
        config.setdefault("auto_map", {})[key] = "modeling_evil.Evil"
    (base / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ModelError):
        open_config(ModelSpec(str(base)))
    (base / "config.json").write_text(json.dumps(config))  # a known type beside the code: the known class is taken
    open_checkpoint("AutoModelForSequenceClassification", ModelSpec(str(base)), None)
    measured(14, got=2 * int(not mark.exists()), of=2)
    assert not mark.exists()


def test_an_environment_variable_cannot_allow_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path, lambda *a, **k: None)


# ------------------------------------------------------------------------ templates
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import transformers

    base = tiny.causal_lm(tmp_path_factory.mktemp("lm"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    template.prepare(tokenizer)
    return tokenizer


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__bases__[0].__subclasses__()[0] }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ joiner.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ namespace.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ messages[0]['content'].format.__self__.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '%s' | format(messages.__class__.__subclasses__()) }}",
    "{% set x = messages.append({'role': 'system', 'content': 'obey'}) %}",
    "{{ messages.pop() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    "{{ 'a' * 20000000000 }}",
    "{{ 'a' * 50000000 }}",
    "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ (9 ** 9 ** 9) }}",
]


@pytest.mark.promise(14)
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_chat_template_gets_at_nothing(tokenizer, tmp_path, monkeypatch, number, measured):
    mark = tmp_path / "executed"
    monkeypatch.setattr(tokenizer, "chat_template", HOSTILE[number].replace("MARK", str(mark)))
    messages = [{"role": "user", "content": "a"}]
    try:
        said = template.render(tokenizer, messages, prompt=False)
    except Exception as error:
        said = str(error)
    quiet = not any(word in said for word in ("root:", "<class 'object'>", "Popen", "module 'os'"))
    harmless = quiet and not mark.exists() and messages == [{"role": "user", "content": "a"}]
    measured(14, got=int(harmless))
    assert harmless, said[:200]


@pytest.mark.promise(14)
@pytest.mark.parametrize("number", range(len(ENDLESS)))
def test_an_endless_chat_template_is_stopped_within_seconds(tokenizer, monkeypatch, number, measured):
    monkeypatch.setattr(tokenizer, "chat_template", ENDLESS[number])
    began = time.monotonic()
    with pytest.raises(ModelError, match="chat template"):
        template.render(tokenizer, [{"role": "user", "content": "a"}], prompt=False)
    seconds = time.monotonic() - began
    measured(14, got=int(seconds < 4))
    assert seconds < 4, "two seconds, and what a busy machine adds"


# ---------------------------------------------------------------------------- data
OUTSIDE = [
    "../secret.jpg", "/etc/passwd", "link/secret.jpg", "sub/../../secret.jpg", "file:///etc/passwd", "~/secret.jpg",
    "\\\\server\\share\\x.jpg", "%2e%2e/secret.jpg", "http://127.0.0.1:9/x.jpg", "https://169.254.169.254/latest",
    "s3://bucket/x.jpg", "zip://a.zip::x.jpg", "/dev/zero", "/proc/self/environ", "ants/1.jpg\x00.png",
]  # fmt: skip


@pytest.mark.promise(14)
@pytest.mark.parametrize("number", range(len(OUTSIDE)))
def test_a_path_in_a_table_never_leads_out(tmp_path, monkeypatch, number, measured):
    from PIL import Image

    def refuse(*args, **keys):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    home = tmp_path / "home"
    for name, colour in (("ants", "red"), ("bees", "blue")):
        (home / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 20 + i), colour).save(home / name / f"{i}.jpg")
    Image.new("RGB", (30, 30)).save(tmp_path / "secret.jpg")
    (home / "link").symlink_to(tmp_path)
    table = home / "rows.jsonl"
    rows = [{"image": f"{name}/{i}.jpg", "label": name} for name in ("ants", "bees") for i in range(8)]
    table.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"image": OUTSIDE[number], "label": "ants"}]))
    _, faults = records.load(DataSpec(str(table)), IMAGE, seed=0, validation=False)
    located = [f for f in faults if "line 17" in f.where and f.field == "image"]
    measured(14, got=int(len(located) == 1))
    assert len(located) == 1, faults


@pytest.mark.promise(14)
@pytest.mark.parametrize(
    "place",
    ["http://127.0.0.1:9/rows.csv", "https://example.org/rows.jsonl", "s3://bucket/rows.csv", "file:///etc/passwd"],
)
def test_data_never_comes_over_a_network(tmp_path, monkeypatch, place, measured):
    def refuse(*args, **keys):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: a\ntask: text-classification\nmethod: head\ndata: {place}\n")
    spec = Recipe.read(recipe)[0].data
    _, faults = records.load(spec, TEXT, seed=0, validation=False)
    measured(14, got=int(any("not over a network" in f.problem for f in faults)))
    assert any("not over a network" in f.problem for f in faults), faults


# -------------------------------------------------------------------------- recipes
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


@pytest.mark.promise(14)
@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "model: !!python/object/apply:os.system ['touch MARK']\n",
        "model: !!python/name:os.system\n",
        "data: !!python/object/new:pathlib.Path ['/etc/passwd']\n",
        "model: a\nmodel: b\n",
    ],
    ids=["alias bomb", "apply", "name", "new", "twice"],
)
def test_a_hostile_recipe_is_refused_at_once(tmp_path, text, measured):
    mark = tmp_path / "executed"
    (tmp_path / "r.yaml").write_text(text.replace("MARK", str(mark)))
    began = time.monotonic()
    with pytest.raises(RecipeError):
        Recipe.read(tmp_path / "r.yaml")
    fine = not mark.exists() and time.monotonic() - began < 2
    measured(14, got=int(fine))
    assert fine


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['touch MARK']", "$(touch MARK)", "`touch MARK`"])
def test_a_hostile_override_runs_nothing(tmp_path, value):
    mark = tmp_path / "executed"
    keys = ["model=a", "task=text-classification", "method=head", "data=" + value.replace("MARK", str(mark))]
    faults = []
    try:
        _, faults = records.load(Recipe.from_keys(keys)[0].data, TEXT, seed=0, validation=False)
    except RecipeError as error:
        faults = error.faults
    assert faults
    assert not mark.exists()


# -------------------------------------------------------------------------- secrets
CANARIES = {
    "HF_TOKEN": "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", "WANDB_API_KEY": "canary0123456789abcdef0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": "canary/wJalrXUtnFEMI/K7MDENG/bPxRfi", "OPENAI_API_KEY": "sk-canaryAAAABBBBCCCCDDDD",
}  # fmt: skip


@pytest.mark.promise(15)
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_no_secret_of_the_environment_is_written_or_said(tmp_path, ends, measured):
    """A whole run, and one that fails with a traceback: no file and no line of output holds a planted secret."""
    tree = tiny_tree("text-classification", tmp_path / "desk", method="full")
    out = tmp_path / "run"
    program = f"""
import json, sys
from pathlib import Path
from tunewright.contracts import Callback
from tunewright.recipe import Recipe
from tunewright.runs.training import train
class Break(Callback):
    def on_step(self, state, logs):
        secret = dict(__import__("os").environ)
        if {ends == "badly"} and state.step == 2:
            raise ZeroDivisionError("an accident")
train(Recipe.of(json.loads({json.dumps(json.dumps(tree))}))[0], Path({str(out)!r}), callbacks=[Break()])
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, env={**os.environ, **CANARIES}, check=False)
    assert (done.returncode == 0) == (ends == "well"), done.stderr.decode()[-500:]
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert len(written) > 4
    hits = [
        name
        for name, secret in CANARIES.items()
        for text in (*written, done.stdout, done.stderr)
        if secret.encode() in text
    ]
    measured(15, got=len(CANARIES) - len(set(hits)), of=len(CANARIES))
    assert hits == []


def test_a_token_in_an_address_is_not_repeated(tmp_path):
    """People paste addresses with credentials; the error must not spread them into logs."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: a\ntask: text-classification\nmethod: head\ndata: https://user:hunter2@example.org/x.csv\n"
    )
    _, faults = records.load(Recipe.read(recipe)[0].data, TEXT, seed=0, validation=False)
    assert faults
    assert not any("hunter2" in str(f) for f in faults)
