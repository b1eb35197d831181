"""Conversations: the row formats of the field, told apart by their columns, each turned into role and content.

Knows columns and values, no tokenizer and no task. A conversation is the one kind of field made of several columns:
what the columns are called stands in FORMATS, and columns.py looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunewright.data.raw import BadValue, Remarks, short, spoken
from tunewright.errors import nearest

Message = dict[str, str]  # {"role": system | user | assistant, "content": text}
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SPEAKERS = {"human": "user", "gpt": "assistant"} | ROLES  # as ShareGPT's `from` spells them
TWIN = {"from": "role", "value": "content"}


@dataclass(frozen=True)
class Format:
    """One way in which people write conversations down.

    needs, may: the parts, each a column; a row is of this format where all it needs are there.
    read: the parts' values -> messages, not yet checked as a whole.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], list[Message]]
    may: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return self.needs + self.may


# --------------------------------------------------------------------- formats
def _messages(parts: Mapping[str, Any]) -> list[Message]:
    return _turns(parts["messages"], "messages")


def _sharegpt(parts: Mapping[str, Any]) -> list[Message]:
    turns = _turns(parts["conversations"], "conversations", "from", "value", SPEAKERS)
    return [*_said("system", parts.get("system"), "system"), *turns]


def _alpaca(parts: Mapping[str, Any]) -> list[Message]:
    messages = _said("system", parts.get("system"), "system")
    history = parts.get("history")
    if history is not None and not isinstance(history, list):
        raise BadValue("the history is no list", expected="pairs of question and answer", got=spoken(history))
    for number, pair in enumerate(history or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadValue(f"history {number} is no pair", expected="[question, answer]", got=spoken(pair))
        messages += _said("user", pair[0], f"history {number}", needed=True)
        messages += _said("assistant", pair[1], f"history {number}", needed=True)
    asked = [
        content["content"] for part in ("instruction", "input") for content in _said("user", parts.get(part), part)
    ]
    messages += _said("user", "\n".join(asked), "instruction", needed=True)
    return messages + _said("assistant", parts.get("output"), "output", needed="output" in parts)


def _prompt(parts: Mapping[str, Any]) -> list[Message]:
    messages = _said("system", parts.get("system"), "system")
    for part, role in (("prompt", "user"), ("completion", "assistant")):
        value = parts.get(part)
        if isinstance(value, list):
            messages += _turns(value, part)
        elif part in parts:
            messages += _said(role, value, part, needed=True)
    return messages


def _text(parts: Mapping[str, Any]) -> list[Message]:
    return _said("assistant", parts["text"], "text", needed=True)


def _question(parts: Mapping[str, Any]) -> list[Message]:
    return _said("user", parts["text"], "text", needed=True)


FORMATS = (
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), _sharegpt, ("system",)),
    Format("alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history")),
    Format("prompt/completion", ("prompt", "completion"), _prompt, ("system",)),
    Format("text", ("text",), _text),
)
OPENINGS = (  # the same without the answer
    *FORMATS[:2],
    replace(FORMATS[2], needs=("instruction",)),
    replace(FORMATS[3], needs=("prompt",)),
    replace(FORMATS[4], read=_question),
)
ALIASES = {"completion": ("response",)}  # other names of a part, so usual that they are no guess
MAPPABLE = {  # names that mean a part often enough to ask about, not to guess
    "prompt": ("question", "query", "user", "source"),
    "completion": ("answer", "assistant", "target", "output", "reply"),
}


# ----------------------------------------------------------------------- turns
def _turns(
    value: Any, part: str, role_key: str = "role", content_key: str = "content", roles: Mapping[str, str] = ROLES
) -> list[Message]:
    example = f'[{{"{role_key}": "{next(iter(roles))}", "{content_key}": "..."}}, ...]'
    if not isinstance(value, list):
        raise BadValue(f'"{part}" is no list of turns', expected=f"a list such as {example}", got=_got(value))
    if not value:
        raise BadValue(f'"{part}" is an empty list', expected=f"turns such as {example}")
    messages = []
    for number, turn in enumerate(value, 1):
        place = f"turn {number}"
        if not isinstance(turn, dict):
            raise BadValue(f"{place} is no object", expected=f"turns such as {example}", got=_got(turn))
        if role_key == "role" and "role" not in turn and TWIN.keys() & turn.keys():
            remedy = f"These are ShareGPT turns: map the column as such, data.columns.conversations={part}"
            raise BadValue(f"{place} is written with from and value", expected="role and content", remedy=remedy)
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            remedy = nearest(str(role), list(roles))
            problem = (
                f'{place} has the {role_key} "{short(role)}"' if role_key in turn else f"{place} has no {role_key}"
            )
            raise BadValue(problem, expected=f"one of {', '.join(roles)}", remedy=remedy)
        messages += _said(roles[role], turn.get(content_key), place, needed=True)
    return messages


def _said(role: str, content: Any, place: str, needed: bool = False) -> list[Message]:
    """One turn as a list; empty where there is nothing and nothing is needed."""
    if content is None:
        if not needed:
            return []
        raise BadValue(f"the content of {place} is null or missing", expected="a text")
    if not isinstance(content, str):
        raise BadValue(f"the content of {place} is no text", expected="a text", got=_got(content))
    if not content.isascii() and any("\ud800" <= letter <= "\udfff" for letter in content):
        raise BadValue(f"a character of {place} is half of a surrogate pair", got=short(ascii(content)))
    if role == "assistant" and not content.strip():
        got = f"{len(content)} blanks" if content else ""
        raise BadValue(f"the answer in {place} is empty", expected="something to learn", got=got)
    return [{"role": role, "content": content}] if content.strip() or needed else []


def _got(value: Any) -> str:
    return "nothing" if value is None else spoken(value)


# ------------------------------------------------------------------- the field
def conversation(value: Any, root: Path, remarks: Remarks) -> list[Message]:
    """Messages with at least one answer of the assistant. `value`: the parts of one format, by name."""
    messages = _read(value, FORMATS)
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise BadValue("no turn of the assistant: there is nothing to learn", expected="an answer", got=f"only {roles}")
    remarks["conversations end with a turn that has no answer; it is left out", ""] += (
        messages[-1]["role"] != "assistant"
    )
    remarks["conversations have an empty question", ""] += any(not m["content"].strip() for m in messages)
    remarks["conversations hold NUL characters", ""] += any("\0" in m["content"] for m in messages)
    return messages


def opening(value: Any, root: Path, remarks: Remarks) -> list[Message]:
    """Messages that ask; an answer may be there and is not needed."""
    return _read(value, OPENINGS)


def _read(parts: Mapping[str, Any], formats: Sequence[Format]) -> list[Message]:
    fitting = next(f for f in formats if set(f.needs) <= parts.keys() <= set(f.parts))
    return fitting.read(parts)


def from_text(text: str) -> list[Message]:
    """A text that somebody typed, as a conversation of one turn."""
    return [{"role": "user", "content": text}]


def asked(messages: Sequence[Message]) -> list[Message]:
    """What stands before the last answer: all of it where there is none."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return list(messages[:last])


def as_text(messages: Sequence[Message]) -> str:
    """What was asked, for people: the question alone, or the turns with their roles."""
    before = asked(messages)
    if len(before) == 1 and before[0]["role"] == "user":
        return before[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in before)


def key_text(messages: Sequence[Message]) -> str:
    """Rows with equal texts are copies. The question counts, not its answer: as for a text and its label."""
    before = asked(messages)
    said = before if any(message["role"] == "user" for message in before) else messages
    return "\x1e".join(f"{message['role']} {message['content']}" for message in said)
