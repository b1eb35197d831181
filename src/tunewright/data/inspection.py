"""Whether values can be learnt from: each by its kind, then labels, copies and overlaps over whole sets.

Knows kinds (text, label, image, conversation), never a task. Faults carry the row and the field; what is merely odd
is counted.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunewright.data import chat
from tunewright.data.columns import FORMATS, MANY_CLASSES
from tunewright.data.raw import BadValue, RawRow, Remarks, natural, short, shown, spoken
from tunewright.errors import Fault, nearest

if TYPE_CHECKING:
    from tunewright.contracts import Field, Record

MOST_PIXELS = 64_000_000  # 8000 x 8000: larger files are scans to be cut up, or bombs
LEAST_SIDE = 8  # pixels; below this there is nothing to see
FEW_ROWS = 5  # a class with fewer is noted


# ------------------------------------------------------------------ one value
def text(value: Any, root: Path, remarks: Remarks) -> str:
    """A string with something to read in it."""
    if value is None:
        raise BadValue("the value is null", expected="a text")
    if not isinstance(value, str):
        raise BadValue("the value is no text", expected="a text", got=spoken(value))
    if not value.strip():
        raise BadValue("the text is empty", expected="a text", got=f"{len(value)} blanks" if value else "")
    if not value.isascii() and not any(c.isprintable() and not c.isspace() for c in value):
        raise BadValue("the text holds nothing that can be read", expected="a text", got=short(ascii(value)))
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadValue("a character is half of a surrogate pair", expected="a text", got=short(ascii(value)))
    remarks["texts hold NUL characters", ""] += "\0" in value
    return value


def label(value: Any, root: Path, remarks: Remarks) -> str:
    """A class name. Whole numbers and truth values are names too; the spelling "007" stays as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        problem = "labels are floats: regression is not built yet"
        raise BadValue(problem, expected="a class name", got=str(value), remedy='Write classes as text, such as "0.5".')
    if isinstance(value, (list, dict)):
        raise BadValue("multi-label is not built yet", expected="one class name", got=spoken(value))
    if value is None or not value.strip():
        raise BadValue("the label is null" if value is None else "the label is empty", expected="a class name")
    remarks["labels had blanks around them; cut off", ""] += value != value.strip()
    return value.strip()


def image(value: Any, root: Path, remarks: Remarks) -> str:
    """A file under `root` that decodes from first to last pixel; its absolute path."""
    text(value, root, Counter())
    if "\0" in value:
        raise BadValue("the path holds a NUL character", expected="a file's path", got=short(value, 200))
    path = (root / value).resolve()
    if not path.is_relative_to(root.resolve()):
        inside = f"a path under {root.name}/"
        raise BadValue("the path leads out of the data folder", expected=inside, got=short(value, 200))
    if not path.is_file():
        here = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadValue("there is no such image", got=short(value, 200), remedy=nearest(path.name, here))
    raw = path.read_bytes()
    if not raw:
        raise BadValue("the image file is empty (0 bytes)", got=short(value, 200))
    mode, width, height = _decode(raw, short(value, 200))
    remarks["images are not RGB ({}); converted", mode] += mode != "RGB"
    remarks[f"images have a side under {LEAST_SIDE} pixels", ""] += min(width, height) < LEAST_SIDE
    return str(path)


def _decode(raw: bytes, place: str) -> tuple[str, int, int]:
    """(mode, width, height) of an image that was decoded to its end; its size is looked at before that."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning on size: ours is stricter
            with Image.open(io.BytesIO(raw)) as opened:
                mode, (width, height) = opened.mode, opened.size
                fits = width * height <= MOST_PIXELS
                if fits:
                    opened.verify()  # checksums; leaves the image unusable
            if fits:
                Image.open(io.BytesIO(raw)).load()
    except Image.DecompressionBombError as error:
        raise _too_large(f"{place} (more than twice what Pillow opens)") from error
    except Image.UnidentifiedImageError as error:
        got = f"{place} ({len(raw)} bytes, beginning {raw[:8]!r})"
        raise BadValue("the file is no image that Pillow knows", expected="an image", got=got) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        got = f"{place} ({len(raw)} bytes: {short(error)})"
        raise BadValue("the image is damaged", expected="an image that decodes to its end", got=got) from error
    if not fits:
        raise _too_large(f"{place} ({width} x {height})")
    return mode, width, height


def _too_large(got: str) -> BadValue:
    most = f"at most {MOST_PIXELS // 10**6} million pixels"
    return BadValue("the image is too large", expected=most, got=got, remedy="Scale it down.")


KINDS: dict[str, Callable[[Any, Path, Remarks], Any]] = {
    "text": text,
    "label": label,
    "image": image,
    "conversation": chat.conversation,
    "opening": chat.opening,
}
UNANSWERED = {"conversation": "opening"}  # kinds that hold question and answer, and what they are without the answer
FROM_TEXT: dict[str, Callable[[str], Any]] = {"conversation": chat.from_text}  # what somebody types, as this kind
AS_TEXT: dict[str, Callable[[Any], str]] = {"text": str, "conversation": chat.as_text}  # the question, for people


# ------------------------------------------------------- what makes rows copies
def _text_key(value: str) -> str:
    return " ".join(unicodedata.normalize("NFC", value).split())


def _image_key(value: str) -> str:
    return hashlib.sha256(Path(value).read_bytes()).hexdigest()


KEYS: dict[str, Callable[[Any], str]] = {  # a label is no content, nor is an answer
    "text": _text_key,
    "image": _image_key,
    "conversation": lambda messages: _text_key(chat.key_text(messages)),
}


def content_key(record: Record, fields: Mapping[str, Field]) -> str:
    """Equal for rows with the same content: text up to Unicode form and white space, images byte by byte."""
    return "\x1f".join(KEYS[f.kind](record[name]) for name, f in fields.items() if f.kind in KEYS)


# -------------------------------------------------------------------- one row
def check_row(
    row: RawRow, columns: Mapping[str, str], fields: Mapping[str, Field], root: Path, remarks: Remarks
) -> tuple[dict[str, Any], list[Fault]]:
    """(the task's fields with tidy values, faults); a field with a fault is absent."""
    values: dict[str, Any] = {}
    faults = []
    for name, field in fields.items():
        try:
            if field.kind in FORMATS and (parts := columns.keys() - fields.keys()):
                values[name] = KINDS[field.kind]({p: row.values.get(columns[p]) for p in parts}, root, remarks)
            elif name in columns:
                values[name] = KINDS[field.kind](_value(row, columns[name]), root, remarks)
        except BadValue as bad:
            faults.append(Fault(bad.problem, row.where, name, bad.expected, bad.got, bad.remedy))
    return values, faults


def _value(row: RawRow, column: str) -> Any:
    if column not in row.values:
        there = f"only {short(', '.join(row.values))}"
        raise BadValue("the field is missing", expected=f'a field "{column}"', got=there)
    return row.values[column]


def remark_notes(remarks: Remarks) -> list[str]:
    """Counted remarks as sentences: `12 images are not RGB (CMYK, L); converted`."""
    said: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for (sentence, detail), count in sorted(remarks.items()):
        said[sentence] += [(detail, count)] if count else []
    return [
        f"{sum(n for _, n in parts)} {sentence.format(', '.join(f'{d}: {n}' for d, n in parts))}"
        for sentence, parts in said.items()
        if parts
    ]


# ------------------------------------------------------------------ whole sets
def label_faults(names: Sequence[str], where: str, name: str) -> list[Fault]:
    """What makes a training set's labels useless as a whole."""
    counts = Counter(names)
    if len(counts) > MANY_CLASSES and len(counts) > len(names) / 2:
        return [
            Fault(
                "nearly every row has its own label: this looks like free text or numbers",
                where,
                name,
                expected="class names that come back",
                got=f"{len(counts)} in {len(names)} rows, such as {shown([short(n, 20) for n in counts], 3)}",
                remedy=f"Is another column the label? Map it: data.columns.{name}=the-right-column",
            )
        ]
    if len(counts) == 1:
        got = f'only "{next(iter(counts))}", in {len(names)} rows'
        return [Fault("there is one class only: nothing can be learnt", where, name, expected="two or more", got=got)]
    return []


def unknown_labels(records: Iterable[Record], name: str, known: Sequence[str]) -> list[tuple[Fault, list[Record]]]:
    """Labels that no training row has: one fault for each, with its rows."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record[name] not in known:
            found[record[name]].append(record)
    return [(_unknown(label, rows, name, known), rows) for label, rows in found.items()]


def _unknown(label: str, rows: Sequence[Record], name: str, known: Sequence[str]) -> Fault:
    places = shown([record["where"] for record in rows], 5)
    return Fault(
        "no training row has this label",
        rows[0]["where"],
        name,
        expected=f"one of {shown(known, 20)}",
        got=f'"{short(label)}" in {len(rows)} row{"s" if len(rows) > 1 else ""}: {places}',
        remedy=nearest(label, known),
    )


def label_notes(counts: Mapping[str, int]) -> list[str]:
    """What is odd about the labels of the training rows, but may be meant."""
    names = list(counts)
    notes = []
    if few := [f"{name} ({counts[name]})" for name in names if counts[name] < FEW_ROWS]:
        notes.append(f"classes with fewer than {FEW_ROWS} training rows: {shown(few)}")
    numbers = [name for name in names if name.lstrip("-").isdigit()]
    if numbers and len(numbers) < len(names):
        words = [name for name in names if name not in numbers]
        notes.append(f"labels mix numbers ({shown(numbers, 3)}) and words ({shown(words, 3)}): are they one set?")
    if any("." in name for name in names) and all(_is_number(name) for name in names):
        notes.append(f"labels look like decimal numbers ({shown(names, 3)}) and are taken as class names")
    folded = defaultdict(list)
    for name in names:
        folded[name.casefold()].append(name)
    notes += [f"labels differ only in case: {', '.join(same)}" for same in folded.values() if len(same) > 1]
    return notes


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def same_contents(records: Iterable[Record], fields: Mapping[str, Field]) -> np.ndarray:
    """(N,) int: for every record, the place of the first one with its content; compared by 128 bits of a digest."""
    digests = bytearray()
    for record in records:
        digests += hashlib.sha256(content_key(record, fields).encode("utf-8", "surrogatepass")).digest()[:16]
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return first


def copies(places: np.ndarray, contents: np.ndarray, records: Sequence[Record]) -> tuple[int, str]:
    """How many of the rows at these places repeat the content of an earlier one, and an example."""
    first = places[_first(contents[places])]
    again = np.flatnonzero(first != places)
    if not len(again):
        return 0, ""
    row, earlier = records[int(places[again[0]])], records[int(first[again[0]])]
    return len(again), f"{row['where']} repeats {earlier['where']}"


def conflicts(
    places: np.ndarray, contents: np.ndarray, labels: Sequence[str], records: Sequence[Record]
) -> tuple[int, str]:
    """How many contents of the rows at these places carry more than one label, and an example. labels: by place."""
    torn: dict[int, tuple[int, int]] = {}
    first = places[_first(contents[places])]
    for place, earlier in zip(places[first != places].tolist(), first[first != places].tolist(), strict=True):
        if labels[earlier] != labels[place]:
            torn.setdefault(earlier, (earlier, place))
    if not torn:
        return 0, ""
    earlier, place = next(iter(torn.values()))
    said = [f"{records[one]['where']} says {labels[one]}" for one in (earlier, place)]
    return len(torn), ", ".join(said)


def _first(numbers: np.ndarray) -> np.ndarray:
    """Where each number stands for the first time."""
    _, index, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return index[inverse]


def natural_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Every label once, in the order a person expects: 1, 2, 10."""
    return tuple(sorted(set(names), key=natural))
