"""Conversations as a model's tokens: its chat template, and which tokens are an answer.

Knows tokenizers and messages, no loss and no task. The mask follows from where a piece of text came from, never from a
token's id: a padding token that is also the end token, or an end token in the middle, cannot confuse it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
import jinja2.nodes
import torch
from torch import Tensor

from tunewright.errors import Fault, ModelError

Message = dict[str, str]

# For a base without a template: words, no markers of control, since those would be new to the model and cost a small
# context dearly (ChatML: 34 of the 512 tokens of a 512-word vocabulary for one question, this: 12).
PLAIN = (
    "{BOS}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}"
    "{% else %}{{ ('' if loop.first else 'A:\n') + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt and messages %}{{ 'A:\n' }}{% endif %}"
)
SECONDS = 2.0  # a template takes well under a millisecond
MEMORY = 1 << 30
LONGEST = 1_000_000  # characters around what people wrote
STATUS = Path("/proc/self/statm")
MARK = re.compile("\ue0f1(\\d+)\ue0f2")  # stands for a content while its surroundings are rendered


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that are an answer, or are not."""

    ids: list[int]
    answer: bool


def prepare(tokenizer: Any) -> list[str]:
    """Give the tokenizer what it lacks: a plain template, a padding token. Returns what was done, with reasons."""
    if tokenizer.eos_token is None:
        remedy = 'Name one in tokenizer_config.json, such as "eos_token": "</s>".'
        raise ModelError(Fault("the tokenizer has no end token, so no answer could ever end", remedy=remedy))
    notes = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append("The tokenizer has no padding token: its end token pads, hidden by the mask.")
    if not tokenizer.chat_template:
        ids = tokenizer("a")["input_ids"]
        starts = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = PLAIN.replace("{BOS}", "{{ bos_token }}" if starts else "")
        notes.append(
            'The base has no chat template: a question is written "Q: ...", its answer on the next lines after "A:", '
            f"closed by {tokenizer.eos_token}; the template is saved with the model."
        )
    return notes


def end_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's own, and the one with which the template closes."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])]
    control = control_ids(tokenizer)
    return list(dict.fromkeys([*ids, *[i for i in _closing(tokenizer) if i in control][:1]]))


def closes(tokenizer: Any, ends: Sequence[int]) -> bool:
    """Whether the template itself puts an end token behind an answer."""
    return any(i in ends for i in _closing(tokenizer))


def _closing(tokenizer: Any) -> list[int]:
    """Tokens that the template puts behind an answer."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = render(tokenizer, probe, False).rpartition("b")[2]
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def control_ids(tokenizer: Any) -> set[int]:
    """Ids that steer the model and are no text: start, end, padding, turn markers. The unknown token is text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def render(tokenizer: Any, messages: Sequence[Message], prompt: bool) -> str:
    """The template's text, made in transformers' sandbox. `prompt`: up to where an answer would begin.

    The sandbox keeps a template from the system, not from running for hours or filling the memory: time, memory and
    length are limited here. Raises ModelError where a template exceeds them.
    """
    if not messages and prompt:
        return render(tokenizer, messages, False)
    if _has_powers(tokenizer.chat_template):
        raise _excessive("computes powers, which nothing can interrupt,", len(messages))
    limit = LONGEST + 10 * sum(len(m["content"]) for m in messages)
    try:
        with _bounded():
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except (TimeoutError, MemoryError, OverflowError) as error:
        what = f"took more than {SECONDS:.0f} seconds of processor time or {MEMORY >> 20} MiB"
        raise _excessive(what, len(messages)) from error
    if len(text) > limit:
        raise _excessive(f"wrote {len(text):,} characters", len(messages))
    return text


@functools.lru_cache(maxsize=8)
def _has_powers(source: str) -> bool:
    """9 ** 9 ** 9 is one instruction to Python: no deadline reaches it."""
    try:
        return any(jinja2.Environment(autoescape=True).parse(source).find_all(jinja2.nodes.Pow))
    except jinja2.TemplateSyntaxError:
        return False  # with transformers' own extensions it may be fine; if not, they say so


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """A deadline and a ceiling for new memory, where the system and the thread allow them.

    Processor time, not time on the wall: a busy machine must not make a template hostile.
    """
    here = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, late) if here else None
    try:
        if here:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        if STATUS.exists():  # Linux; a limit without knowing what is in use would be a guess
            resource.setrlimit(resource.RLIMIT_AS, (_in_use() + MEMORY, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if here:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


def _in_use() -> int:
    """Bytes of address space that this process has taken."""
    return int(STATUS.read_text().split()[0]) * resource.getpagesize()


def _excessive(what: str, turns: int) -> ModelError:
    remedy = "A template that does so is broken or hostile: put a plain chat_template.jinja beside the base."
    return ModelError(Fault(f"the chat template {what} for {turns} turns", where="chat template", remedy=remedy))


# ---------------------------------------------------------------------- pieces
def pieces(tokenizer: Any, messages: Sequence[Message], ends: Sequence[int], prompt: bool = False) -> list[Piece]:
    """A conversation as alternating pieces; every answer closes with an end token.

    prompt: messages ask, and the last piece ends where the answer would begin. What people wrote never becomes control
    tokens: where it spells one, it is encoded apart. Raises ModelError where the template cannot be taken apart.
    """
    contents = [message["content"] for message in messages]
    if holds_control(tokenizer, contents):
        messages = [m | {"content": f"\ue0f1{i}\ue0f2"} for i, m in enumerate(messages)]
    else:
        contents = []
    found, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        context, whole = _context(tokenizer, messages[:i]), render(tokenizer, messages[: i + 1], False)
        if not (context.startswith(done) and whole.startswith(context)):
            raise _rewrites(message, i)
        found.append(Piece(encode(tokenizer, context[len(done) :], contents), answer=False))
        found += _answer(tokenizer, encode(tokenizer, whole[len(context) :], contents), ends)
        done = whole
    if prompt:
        context = _context(tokenizer, messages)
        if not context.startswith(done):
            raise _rewrites(messages[-1], len(messages) - 1)
        found.append(Piece(encode(tokenizer, context[len(done) :], contents), answer=False))
    return found


def asked(tokenizer: Any, request: str) -> Tensor:
    """(T,) ids of one request up to where its answer begins: by the template, else as a question in plain words."""
    if tokenizer.chat_template:
        found = pieces(tokenizer, [{"role": "user", "content": request}], end_ids(tokenizer), prompt=True)
        ids = [i for piece in found for i in piece.ids]
    else:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = start + tokenizer(f"Q: {request}\nA:", add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _context(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        return render(tokenizer, messages, True)
    except Exception:
        if messages:
            raise
        return tokenizer.bos_token or ""  # templates that insist on a first message


def _answer(tokenizer: Any, ids: list[int], ends: Sequence[int]) -> list[Piece]:
    """The answer up to its end token, which is added where the template has none; what follows is no answer."""
    last = max((place for place, i in enumerate(ids) if i in ends), default=None)
    if last is None:
        return [Piece([*ids, tokenizer.eos_token_id], answer=True)]
    rest = [Piece(ids[last + 1 :], answer=False)] if ids[last + 1 :] else []
    return [Piece(ids[: last + 1], answer=True), *rest]


def holds_control(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether a text spells a token that would steer the model, or one of our marks."""
    return spells(control_names(tokenizer), texts)


def control_names(tokenizer: Any) -> list[str]:
    """How the tokens that steer the model are spelt."""
    return [token for token in tokenizer.convert_ids_to_tokens(sorted(control_ids(tokenizer))) if token]


def spells(names: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether a text holds one of the names, or one of our marks."""
    return any(name in text for text in texts for name in names) or any(MARK.search(text) for text in texts)


def encode(tokenizer: Any, text: str, contents: Sequence[str] = ()) -> list[int]:
    """Tokens of a rendered text. Marks stand for `contents`, which are encoded as plain text whatever they spell."""
    if not contents:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    ids: list[int] = []
    control = control_ids(tokenizer)
    for place, part in enumerate(MARK.split(text)):
        if place % 2 == 0:
            ids += encode(tokenizer, part)
        else:
            plain = tokenizer(contents[int(part)], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids += [i for i in plain if i not in control]
    return ids


def _rewrites(message: Message, i: int) -> ModelError:
    return ModelError(
        Fault(
            f"the chat template writes earlier turns differently once turn {i + 1} ({message['role']}) is there",
            where="chat template",
            expected="a template whose beginning stays the same as a conversation grows",
            remedy="Use one question and one answer a row, or put a plain chat_template.jinja beside the base.",
        )
    )
