"""Which rows: the examples of evidence.json by harm, what broke first and the surest of it; pictures as thumbnails.

Knows rows and pictures, not scores. Long texts are cut, many rows counted: the page stays small. A side that gave no
answer is named so, never shown as an empty cell.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.runs.report import words
from tunewright.runs.report.record import Record, mapping, sequence

KINDS = (  # by harm
    ("broken", "Broke", "the base was right, the tuned model is wrong"),
    ("fixed", "Fixed", "the base was wrong, the tuned model is right"),
    ("changed", "Different", "another answer than the base's, the same score"),
    ("still_wrong", "Still wrong", "both models give the same wrong answer"),
)
SIGNS = {"broken": ("right", "wrong"), "fixed": ("wrong", "right"), "still_wrong": ("wrong", "wrong")}
COUNTS = {"still_wrong": "same_wrong"}  # where evidence.json counts a kind under another name
NOTHING = {"input": "no input kept", "truth": "no right answer given", "base": "no answer", "tuned": "no answer"}
WORDS = re.compile(r"\S+\s*|\s+")
LABEL_WORDS = 5  # texts with fewer words are read at a glance
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # not EPS: Pillow hands that to another program
THUMBNAIL = 96  # px: the longer side of a thumbnail
LARGEST_PICTURE = 100_000_000  # pixels: more is a fault or an attack, and would take the machine's memory


@dataclass(frozen=True)
class Fit:
    """How much of the rows goes onto the page."""

    rows: int = 600  # that changed sides
    others: int = 40  # of each kind that did not
    pictures: int = 120
    head: int = 300  # characters of a text shown at once
    tail: int = 1500  # characters more behind a disclosure


def flipped_rows(record: Record, fit: Fit) -> dict[str, Any]:
    """The rows by harm: broken first, then fixed, then those that answer otherwise or are wrong as before."""
    if samples := [row for row in map(mapping, sequence(record.evidence.get("samples"))) if row]:
        return sampled_rows(record, samples, fit)
    flips = mapping(record.evidence.get("flips"))
    examples = [row for key in ("examples", "others") for row in map(mapping, sequence(flips.get(key))) if row]
    if not examples:
        unchanged = flips.get("fixed") == 0 == flips.get("broken")
        answer = "No row changed sides." if unchanged else "not measured: the evidence holds no examples"
        return {"answer": answer, "kinds": [], "with_image": False}
    quotas = _quotas(examples, fit)
    pictures = Pictures(record.folder, fit.pictures)
    kinds: list[dict[str, Any]] = []
    for kind, title, meaning in KINDS:
        of_kind = sorted((row for row in examples if row.get("kind") == kind), key=_unsure)
        counted = flips.get(COUNTS.get(kind, kind))
        total = max(len(of_kind), int(counted) if words.is_number(counted) else 0)
        shown = [_example(row, fit, pictures, kind) for row in of_kind[: quotas[kind]]]
        if total and (of_kind or kind in ("broken", "fixed")):
            kinds.append(_group(kind, title, meaning, total, shown))
    said = ", ".join(f"{kind['title'].lower()} {kind['total']}" for kind in kinds)
    answer = f"{words.capital(said)}. What broke comes first, the surest of it on top."
    return {"answer": answer, "kinds": kinds, "with_image": any(kind["with_image"] for kind in kinds)}


def _unsure(row: Mapping[str, Any]) -> float:
    """A wrong answer given with confidence does most harm; rows without one keep their order."""
    score = row.get("score")
    return -float(score) if words.is_number(score) else 0.0


def _group(kind: str, title: str, meaning: str, total: int, shown: list[dict[str, Any]]) -> dict[str, Any]:
    left = total - len(shown)
    return {
        "kind": kind, "title": title, "meaning": meaning, "total": words.count(total), "rows": shown,
        "more": words.plural(left, "more row") if left > 0 else "",
        "with_image": any(row["image"] or row["image_reason"] for row in shown),
    }  # fmt: skip


def sampled_rows(record: Record, samples: Sequence[Mapping[str, Any]], fit: Fit) -> dict[str, Any]:
    """Answers of both models side by side, where no answer is simply right or wrong."""
    pictures = Pictures(record.folder, fit.pictures)
    shown = [_example(row, fit, pictures, "sample") for row in samples[: fit.rows]]
    same = sum(row.get("base") == row.get("tuned") for row in samples)
    answer = f"The first {words.plural(len(samples), 'held-out row')} side by side; both models say the same in {same}."
    kind = _group("sample", "Side by side", "in the order of the data, not chosen", len(samples), shown)
    return {"answer": answer, "kinds": [kind], "with_image": kind["with_image"]}


def _quotas(examples: Sequence[Mapping[str, Any]], fit: Fit) -> dict[str, int]:
    """How many of each kind are shown: half for broken, what is left over goes to fixed; the others have their own."""
    present = {kind: sum(row.get("kind") == kind for row in examples) for kind, _, _ in KINDS}
    broken = min(present["broken"], max(fit.rows // 2, fit.rows - present["fixed"]))
    fixed = min(present["fixed"], fit.rows - broken)
    return {"broken": broken, "fixed": fixed, "changed": fit.others, "still_wrong": fit.others}


def _example(row: Mapping[str, Any], fit: Fit, pictures: Pictures, kind: str) -> dict[str, Any]:
    image, reason = pictures.thumbnail(row["image"]) if row.get("image") else ("", "")
    texts = {key: passage(row.get(key), fit, nothing) for key, nothing in NOTHING.items()}
    texts["tuned"]["parts"] = _differing(texts["base"]["head"], texts["tuned"]["head"])
    score = row.get("score")
    sure = _sure(score) if words.is_number(score) and 0 < score <= 1 else ""
    signs = SIGNS.get(kind, ("", ""))
    return {"row": str(row.get("row", "")), "image": image, "image_reason": reason, "sure": sure, "signs": signs,
            **texts}  # fmt: skip


def _sure(score: float) -> str:
    return "> 99% sure" if score > 0.99 else f"{100 * score:.0f}% sure"


def _differing(base: str, tuned: str) -> list[tuple[bool, str]]:
    """`tuned` in pieces, with True for what `base` has not; only where both are longer than a label."""
    before, after = WORDS.findall(base), WORDS.findall(tuned)
    if min(len(before), len(after)) < LABEL_WORDS:
        return [(False, tuned)]
    steps = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [(kind != "equal", "".join(after[start:end])) for kind, _, _, start, end in steps if end > start]


def passage(value: Any, fit: Fit, nothing: str) -> dict[str, Any]:
    """A text as it stands on the page: its head, the rest behind a disclosure, and what was left out for size.

    nothing: what is said where there is no value.
    """
    whole = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    head, rest = words.cut(whole, fit.head)
    shown, lost = words.cut(rest, fit.tail) if fit.tail else ("", rest)
    return {
        "head": head,
        "parts": [(False, head)],
        "rest": shown,
        "length": words.count(len(rest)),
        "lost": words.count(len(lost)) if lost else "",
        "absent": nothing if value is None or value == "" else "",
    }


class Pictures:
    """Thumbnails as data: URIs, until `most` are made; every picture that is not shown has its reason."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder = folder
        self.left = most

    def thumbnail(self, path: Any, side: int = THUMBNAIL) -> tuple[str, str]:
        """(data URI, "") or ("", why not)."""
        if not self.left:
            return "", "left out to keep the page small"
        uri, reason = _thumbnail(
            next((p for p in (self.folder / str(path), Path(str(path))) if _is_file(p)), None), side
        )
        self.left -= bool(uri)
        return uri, reason


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system is no file
        return False


def _thumbnail(path: Path | None, side: int) -> tuple[str, str]:
    if path is None:
        return "", "its file is not there"
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > LARGEST_PICTURE:
                return "", f"{path.name} has {words.large(opened.width * opened.height)} pixels"
            opened.draft("RGB", (4 * side, 4 * side))
            picture = ImageOps.exif_transpose(opened)
            picture = _eight_bit(picture)
            picture.thumbnail((side, side))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "", f"{path.name} cannot be opened as a picture ({type(error).__name__})"
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), ""


def _eight_bit(picture: Any) -> Any:
    """Deep grey pictures (CT, X-ray) are stretched from darkest to brightest; transparency falls on white."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        deep = picture.convert("F")
        low, high = deep.getextrema()
        return deep.point(lambda v: (v - low) * (255.0 / ((high - low) or 1.0))).convert("L")
    if picture.mode in ("RGBA", "LA", "P", "PA"):
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
