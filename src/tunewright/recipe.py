"""A recipe: everything that decides the outcome of a run, as YAML or a Python object.

Reads, expands short forms, translates the words of other tools, refuses what it does not know, and names where each
value came from. Knows no task, method or model: their options are checked where they are built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunewright.errors import Fault, RecipeError, nearest
from tunewright.find import fits, spell
from tunewright.recipe_text import SHORT, commented, flat, lay_over, parse, place, plain, put, rooted, scalar


@dataclass(frozen=True)
class ModelSpec:
    checkpoint: str  # a local folder or a hub id
    revision: str | None = None  # pin it: an id without a revision can change under you
    dtype: str | None = None  # storage of frozen weights; None: the checkpoint's on a GPU, float32 on a CPU
    quantize: Literal["int8", "nf4"] | None = None  # the base only; this is how QLoRA is spelt


@dataclass(frozen=True)
class DataSpec:
    train: str  # a file, a folder or a hub id: org/name, org/name:split, org/name#config:split
    validation: str | None = None
    test: str | None = None
    format: str | None = None  # a file in data/readers; None: by suffix
    columns: dict[str, str] = field(default_factory=dict)  # task field -> the user's column
    group: str | None = None  # column whose rows stay on one side of a split
    holdout: float = 0.1  # share of train that becomes the test set where `test` is absent
    seed: int | None = None  # which rows are held out; None: the recipe's own seed
    limit: int | None = None  # so many training rows, drawn by row id and nested: 100 of them are among 200; None: all
    on_bad_row: Literal["stop", "quarantine"] = "stop"


@dataclass(frozen=True)
class TrainSpec:
    """Field names are those of transformers.TrainingArguments, so that nobody learns them twice."""

    learning_rate: float | None = None  # None: the method's own recommendation, shown in the log
    num_train_epochs: float = 3.0
    max_steps: int | None = None  # optimiser steps; wins over epochs
    per_device_train_batch_size: int = 8  # rows per device and micro-batch
    gradient_accumulation_steps: int = 1
    per_device_eval_batch_size: int = 32
    optim: Literal["adamw", "adamw_8bit", "sgd", "adafactor"] = "adamw"  # adamw_8bit: moments of a byte each
    lr_scheduler_type: Literal["cosine", "linear", "constant", "slanted_triangular"] = "cosine"
    warmup_steps: float = 0.03  # a count, or a share of all steps when below 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 switches clipping off
    precision: Literal["auto", "float32", "bf16"] = "auto"  # of the forward pass; what trains is stored in float32
    train_batch_norm: bool = False  # True: statistics move, and updates depend on how a step is cut
    gradient_checkpointing: bool = False
    activation_offload: bool = False  # what the backward pass needs waits in the machine's memory; for a GPU too small
    torch_compile: bool = False  # blocks are compiled while training; takes a while, the log says what it was worth
    packing: bool | None = None  # sequences laid end to end instead of padded; None: where the model's self-test passes
    save_steps: int = 200
    save_total_limit: int = 2  # newest checkpoints kept; the best one is kept besides
    eval_steps: int = 200
    logging_steps: int = 10
    early_stopping_patience: int | None = None  # evaluations without a new best; the best weights are then restored


@dataclass(frozen=True)
class EvaluateSpec:
    margin: float = 0.02  # the smallest change of the first metric that matters to you; never derived from n
    # rows of the same task that stand for what must not be lost: one file, or name -> file
    general: str | dict[str, str] | None = None
    groups: tuple[str, ...] = ()  # columns by whose values base and tuned are scored apart (language, region, sex)
    harness: tuple[str, ...] = ()  # public benchmarks by lm-evaluation-harness's names, or task files of yours (.yaml)
    canaries: int = 0  # rows of our own planted into the training rows, each with a secret code: are they learnt?
    quick: bool = False  # True: without what needs further passes over the models (messy input, swapped names)

    @property
    def general_sets(self) -> dict[str, str]:
        """Name -> file; a single file is called by its own name."""
        if isinstance(self.general, str):
            return {Path(self.general).stem: self.general}
        return dict(self.general or {})


@dataclass(frozen=True)
class ExportSpec:
    """What is written beside `model/`, in forms that need no adapter."""

    merged: bool = False  # also `merged/`: the change folded into the weights, proven equal in a new process
    tolerance: float = 1e-3  # largest difference of a logit that still counts as equal, relative to the largest logit


@dataclass(frozen=True)
class Choice:
    """A name and its options: `{name: lora, r: 8}` in YAML, or only the name."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a run, and nothing that does not.

    The output folder is an argument of `train`: two recipes with the same digest are the same experiment.
    """

    model: ModelSpec
    task: Choice
    data: DataSpec
    method: Choice
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    export: ExportSpec = ExportSpec()
    seed: int = 0
    came_from: dict[str, str] = field(default_factory=dict, compare=False)  # key -> why, where it is not the default

    @classmethod
    def read(
        cls, path: str | Path, overrides: Sequence[str] = (), *, source: str = "command line"
    ) -> tuple[Recipe, str | None]:
        """Read YAML, apply `train.learning_rate=1e-4` style overrides, check every key and value.

        Relative data and model paths are looked for beside the recipe, then where the command was started.
        source: what is said of the overrides where a value's origin is named.
        Returns the recipe and its `output_dir`, None if it names none.
        Raises RecipeError with all the faults found, not only the first.
        """
        path = Path(path)
        return cls.from_keys(overrides, parse(path), folder=path.parent, name=path.name, source=source)

    @classmethod
    def from_keys(
        cls,
        keys: Sequence[str],
        tree: Mapping[str, Any] | None = None,
        *,
        folder: Path = Path(),
        name: str = "command line",
        source: str = "command line",
    ) -> tuple[Recipe, str | None]:
        """A recipe from `key=value` on top of a mapping, or alone, as the command line takes it without a file."""
        faults: list[Fault] = []
        below = plain(tree or {})
        sources = dict.fromkeys(flat(below), name)
        below = _translate(below, sources, faults)
        above: dict[str, Any] = {}
        for text in keys:
            key, sign, value = text.partition("=")
            if not sign or not key.strip():
                faults.append(Fault(f'"{text}" cannot be read', where="command line", expected="section.key=value"))
                continue
            one: dict[str, Any] = {}
            put(one, key.strip().split("."), scalar(value), faults)
            own = dict.fromkeys(flat(one), source)
            lay_over(above, _translate(one, own, faults))
            sources |= own
        lay_over(below, above)
        return cls.of(below, sources=sources, folder=folder, faults=faults, name=name)

    @classmethod
    def of(
        cls,
        tree: Mapping[str, Any],
        *,
        sources: Mapping[str, str] | None = None,
        folder: Path = Path(),
        faults: Sequence[Fault] = (),
        name: str = "recipe",
    ) -> tuple[Recipe, str | None]:
        """A recipe from nested mappings, as `read` does from a file."""
        found = list(faults)
        tree = plain(tree)
        sources = dict(dict.fromkeys(flat(tree), name) if sources is None else sources)
        tree = _spelt_out(_expand(_translate(tree, sources, found)), sources, found)
        output_dir = tree.pop("output_dir", None)
        if output_dir is not None and not isinstance(output_dir, str):
            found.append(Fault("wrong kind of value", where="output_dir", expected="a folder", got=repr(output_dir)))
        recipe = _build(cls, tree, found)
        if found or recipe is None:
            error = RecipeError([dataclasses.replace(f, where=place(f.where, sources, name)) for f in found])
            if recipe is not None and not any(f.where.startswith("data") for f in found):
                error.rest = recipe.rooted(folder)
            raise error
        return dataclasses.replace(recipe.rooted(folder), came_from=sources), output_dir

    def rooted(self, folder: Path) -> Recipe:
        """Relative paths that exist beneath `folder` made absolute; hub ids stay as they are."""
        data = {k: getattr(self.data, k) for k in ("train", "validation", "test")}
        data = {k: str(rooted(folder, v)) for k, v in data.items() if v is not None}
        files = (".yaml", ".yml")
        harness = tuple(str(rooted(folder, n)) if n.endswith(files) else n for n in self.evaluate.harness)
        general = self.evaluate.general
        if isinstance(general, str):
            general = str(rooted(folder, general))
        elif general is not None:
            general = {name: str(rooted(folder, place)) for name, place in general.items()}
        checkpoint = self.model.checkpoint
        local = rooted(folder, checkpoint)
        if local.is_dir() or checkpoint.startswith((".", "/", "~")):
            checkpoint = str(local)
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, **data),
            model=dataclasses.replace(self.model, checkpoint=checkpoint),
            evaluate=dataclasses.replace(self.evaluate, general=general, harness=harness),
        )

    def tree(self) -> dict[str, Any]:
        """Nested plain values, every default spelt out; `of` gives back an equal recipe."""
        tree = dataclasses.asdict(self)
        tree.pop("came_from")
        tree["task"] = {"name": self.task.name, **self.task.options}
        tree["method"] = {"name": self.method.name, **self.method.options}
        return json.loads(json.dumps(tree))

    def write(
        self,
        path: Path,
        notes: Mapping[str, str] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        path.write_text(self.text(notes, options), encoding="utf-8")

    def text(
        self, notes: Mapping[str, str] | None = None, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> str:
        """YAML with every default spelt out, and behind each value where it came from.

        options: all options of task and method, which the recipe itself does not know; those it leaves out stand as
        comments, so that the file stays the same recipe.
        """
        text = commented(self.tree(), {**self.came_from, **(notes or {})})
        for section, values in (options or {}).items():
            given = getattr(self, section).options
            left = "".join(f"  # {k}: {json.dumps(v)}  # default\n" for k, v in values.items() if k not in given)
            head, tail = text.split(f"{section}:\n", 1)
            own = "".join(itertools.takewhile(lambda line: line.startswith(" "), tail.splitlines(True)))
            text = f"{head}{section}:\n{own}{left}{tail.removeprefix(own)}"
        return text

    def digest(self) -> str:
        """12 hex digits of the canonical form; places count by their last name, so that a moved folder is the same."""
        tree = self.tree()
        del tree["export"]  # what is written besides; the experiment is the same
        for key in ("groups", "harness", "quick"):  # what is measured besides
            del tree["evaluate"][key]
        if not tree["evaluate"]["canaries"]:  # planted rows are trained on; without any, it is the recipe it was before
            del tree["evaluate"]["canaries"]
        for key in ("seed", "limit"):  # a recipe that leaves them out is the one it was before there were such keys
            if tree["data"][key] is None:
                del tree["data"][key]
        for key in ("activation_offload", "torch_compile"):
            if not tree["train"][key]:
                del tree["train"][key]
        for key in ("train", "validation", "test"):
            tree["data"][key] = tree["data"][key] and Path(tree["data"][key]).name
        general = tree["evaluate"]["general"]
        if isinstance(general, dict):
            tree["evaluate"]["general"] = {name: Path(place).name for name, place in general.items()}
        elif general:
            tree["evaluate"]["general"] = Path(general).name
        if Path(tree["model"]["checkpoint"]).is_absolute():
            tree["model"]["checkpoint"] = Path(tree["model"]["checkpoint"]).name
        # `3` and `3.0` are one value: JSON would tell them apart
        tree = json.loads(json.dumps(tree), parse_int=float)
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---------------------------------------------------------- words of other tools
# From the peers' own documents (TRL, Axolotl, LLaMA-Factory). What they became is reported.
ALIASES = {
    "model_name_or_path": "model.checkpoint",
    "base_model": "model.checkpoint",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "finetuning_type": "method.name",
    "val_size": "data.holdout",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "lora_r": "method.r",
    "lora_rank": "method.r",
    "lora_alpha": "method.lora_alpha",
    "lora_dropout": "method.lora_dropout",
    "lora_target": "method.target_modules",
    "lora_target_modules": "method.target_modules",
    "max_length": "task.max_length",
    "max_seq_length": "task.max_length",
    "cutoff_len": "task.max_length",
    "sequence_len": "task.max_length",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "max_train_steps": "train.max_steps",
    "optimizer": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup_ratio": "train.warmup_steps",
    "lr_warmup_steps": "train.warmup_steps",
    "early_stopping_steps": "train.early_stopping_patience",
    "activation_checkpointing": "train.gradient_checkpointing",
}
QUANTIZED = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}


def _translate(tree: dict[str, Any], sources: dict[str, str], faults: list[Fault]) -> dict[str, Any]:
    """Aliases and bare `train` keys at the top, or aliases inside `train`, moved to their own place."""
    tree = _expand(tree)
    own_sections = {f.name for f in dataclasses.fields(Recipe)} | {"output_dir"}
    train_keys = {f.name for f in dataclasses.fields(TrainSpec)}
    nests = [("", tree)] + [(f"{k}.", v) for k, v in tree.items() if k in own_sections and isinstance(v, dict)]
    for prefix, nest in nests:
        known = _section_fields(prefix.removesuffix("."))
        for key in list(nest):
            if (not prefix and key in own_sections) or (prefix and (key in known or key not in ALIASES)):
                continue
            target = ALIASES.get(key) or (f"train.{key}" if not prefix and key in train_keys else None)
            if target in (None, f"{prefix}{key}") or (prefix in ("task.", "method.") and not target.startswith(prefix)):
                continue
            value = nest.pop(key)
            if key in QUANTIZED:
                value = QUANTIZED[key] if value else None
            old, twin = sources.pop(f"{prefix}{key}", "recipe"), sources.get(target, "").partition(', written as "')[2]
            sources[target] = f'{old}, written as "{prefix}{key}"'
            put(tree, target.split("."), value, faults, clash=f"{prefix}{key}", twin=twin.rstrip('"'))
    return tree


# Names under which people know a method with certain options: what each is short for.
SHORT_METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "qlora": {"method": {"name": "lora"}, "model": {"quantize": "nf4"}},
    "dora": {"method": {"name": "lora", "use_dora": True}},
    "rslora": {"method": {"name": "lora", "use_rslora": True}},
    "gradual-unfreezing": {"method": {"name": "layers", "unfreeze": 0.3}},
    "discriminative": {"method": {"name": "layers"}},
    "lp-ft": {"method": {"name": "layers", "head_first": True}},
    "bitfit": {"method": {"name": "layers", "only": "biases"}},
    "linear-probe": {"method": {"name": "head"}},
    "transfer-learning": {"method": {"name": "head"}},
    "adapter": {"method": {"name": "bottleneck"}},
}


def _spelt_out(tree: dict[str, Any], sources: dict[str, str], faults: list[Fault]) -> dict[str, Any]:
    """A short name of a method replaced by what it stands for; what the recipe itself says of a key must agree."""
    method = tree.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    meant = SHORT_METHODS.get(name.strip().replace("_", "-")) if isinstance(name, str) else None
    if meant is None:
        return tree
    tree = plain(tree)
    where = sources.get("method.name") or sources.get("method", "recipe")
    for section, keys in meant.items():
        for key, value in keys.items():
            nest = tree.setdefault(section, {})
            given = nest.get(key) if isinstance(nest, dict) else None
            if (section, key) != ("method", "name") and given is not None and given != value:
                problem = f'"{name}" means {section}.{key}={json.dumps(value)}'
                faults.append(
                    Fault(problem, where=f"{section}.{key}", got=repr(given), remedy="Leave one of them out.")
                )
            elif isinstance(nest, dict):
                nest[key] = value
                sources[f"{section}.{key}"] = f'{where}, meant by "{name}"'
    return tree


def _section_fields(section: str) -> set[str]:
    kinds = {
        "model": ModelSpec, "data": DataSpec, "train": TrainSpec, "evaluate": EvaluateSpec, "export": ExportSpec,
    }  # fmt: skip
    return {f.name for f in dataclasses.fields(kinds[section])} if section in kinds else set()


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: {SHORT[k]: v} if k in SHORT and isinstance(v, str) else v for k, v in tree.items()}


# ------------------------------------------------------------------- checking
REQUIRED = {"": ("model", "task", "data", "method"), "model": ("checkpoint",), "data": ("train",)}
EXAMPLES = {"model": "model: a-folder-or-hub-id", "task": "task: text-classification", "data": "data: rows.csv"}
EXAMPLES |= {"method": "method: lora"}


def _build(cls: type, tree: Mapping[str, Any], faults: list[Fault]) -> Any:
    """The recipe's object from what is right; what is wrong goes to `faults`. None where a needed section is."""
    sections: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.name != "came_from"]
    for key in tree:
        if key not in known:
            everywhere = [*known, *(f.name for f in dataclasses.fields(TrainSpec)), *ALIASES, "output_dir"]
            faults.append(
                Fault(
                    f'unknown key "{key}"',
                    where=key,
                    expected="one of " + ", ".join(known),
                    remedy=nearest(key, everywhere),
                )
            )
    for key in REQUIRED[""]:
        if tree.get(key) is None:
            faults.append(Fault("missing", where=key, remedy=f"Add a line such as `{EXAMPLES[key]}`."))
    for key, value in tree.items():
        kind = hints.get(key)
        if kind is None or key not in known or value is None:  # a section with nothing beneath: all its defaults
            continue
        if key == "seed":
            if not fits(value, int) or not 0 <= value < 2**31:
                faults.append(
                    Fault("wrong value", where=key, expected="a whole number from 0 to 2^31", got=repr(value))
                )
            else:
                sections[key] = value
        elif not isinstance(value, Mapping):
            expected = ("one text, or " if key in SHORT else "") + "a mapping (key: value)"
            faults.append(Fault("wrong kind of value", where=key, expected=expected, got=repr(value)))
        elif kind is Choice:
            sections[key] = _choice(key, value, faults)
        else:
            sections[key] = _section(kind, key, value, faults)
    return cls(**sections) if all(sections.get(key) for key in REQUIRED[""]) else None


def _choice(key: str, value: Mapping[str, Any], faults: list[Fault]) -> Choice | None:
    name = value.get("name")
    if not isinstance(name, str) or not name:
        faults.append(Fault("missing", where=f"{key}.name", remedy=f"Add a line such as `{EXAMPLES[key]}`."))
        return None
    return Choice(name.strip(), {k: v for k, v in value.items() if k != "name"})


def _section(kind: type, section: str, value: Mapping[str, Any], faults: list[Fault]) -> Any:
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    good = {}
    for key, item in value.items():
        where = f"{section}.{key}"
        if key not in known:
            remedy = nearest(key, known)
            faults.append(
                Fault(f'unknown key "{key}"', where=where, expected="one of " + ", ".join(known), remedy=remedy)
            )
            continue
        item = _number(item, hints[key])
        if not fits(item, hints[key]):
            faults.append(Fault("wrong kind of value", where=where, expected=spell(hints[key]), got=repr(item)))
        elif problem := _out_of_range(where, item):
            faults.append(Fault("impossible value", where=where, expected=problem, got=repr(item)))
        else:
            good[key] = tuple(item) if isinstance(item, list) else item
    for key in REQUIRED.get(section, ()):
        if key not in value:
            faults.append(Fault("missing", where=f"{section}.{key}"))
    return kind(**good) if all(k in good for k in REQUIRED.get(section, ())) else None


def _number(value: Any, hint: Any) -> Any:
    """YAML 1.1 reads `2e-4` as text (no dot): what looks like a number where one is wanted is one."""
    if isinstance(value, (str, int)) and not isinstance(value, bool) and fits(1.5, hint) and not fits("", hint):
        try:
            return float(value)  # also 3 for 3.0: the written recipe knows one spelling
        except (ValueError, OverflowError):
            return value
    if isinstance(value, float) and value.is_integer() and fits(1, hint) and not fits(1.5, hint):
        return int(value)
    return value


# key -> (in words, test). The rates are those between which fine-tuning has been seen to work (docs/facts.md).
MOST = 10**9  # a count beyond that is a slip of the hand
COUNT = ("from 1 to 1000000000", lambda v: 1 <= v <= MOST)
RANGES: dict[str, tuple[str, Any]] = {
    "train.learning_rate": ("a rate from 1e-7 to 1 (prompt tuning reaches 0.3)", lambda v: 1e-7 <= v <= 1),
    "train.num_train_epochs": ("more than 0, at most 10000", lambda v: 0 < v <= 10000),
    "train.max_steps": COUNT,
    "train.per_device_train_batch_size": COUNT,
    "train.per_device_eval_batch_size": COUNT,
    "train.gradient_accumulation_steps": COUNT,
    "train.warmup_steps": ("0 or more: a share below 1, a count from 1", lambda v: 0 <= v <= MOST),
    "train.weight_decay": ("from 0 to 1", lambda v: 0 <= v <= 1),
    "train.max_grad_norm": ("0 (off) or more", lambda v: v >= 0),
    "train.save_steps": COUNT,
    "train.save_total_limit": ("2 or more: one may be damaged", lambda v: v >= 2),
    "train.eval_steps": COUNT,
    "train.logging_steps": COUNT,
    "train.early_stopping_patience": COUNT,
    "data.holdout": ("more than 0 and less than 1", lambda v: 0 < v < 1),
    "data.seed": ("a whole number from 0 to 2^31", lambda v: 0 <= v < 2**31),
    "data.limit": COUNT,
    "export.tolerance": ("more than 0, at most 1", lambda v: 0 < v <= 1),
    "evaluate.canaries": ("from 0 to 100", lambda v: 0 <= v <= 100),
    "evaluate.margin": ("from 0 to 1 (0.02 is two points)", lambda v: 0 <= v < 1),
}


def _out_of_range(where: str, value: Any) -> str | None:
    if value is None or where not in RANGES:
        return None
    words, test = RANGES[where]
    return None if value == value and test(value) else words
