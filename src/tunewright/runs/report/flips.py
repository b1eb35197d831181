"""Which rows changed sides: the examples of evidence.json, what broke first, pictures as thumbnails in the page itself.

Knows rows and pictures, not scores. Long texts are cut, many rows counted: the page stays small.
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

KINDS = (
    ("broken", "Broke", "the base was right, the tuned model is wrong"),
    ("fixed", "Fixed", "the base was wrong, the tuned model is right"),
    ("changed", "Changed", "the two models answer differently"),
)
WORDS = re.compile(r"\S+\s*|\s+")
LABEL_WORDS = 5  # texts with fewer words are read at a glance
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # not EPS: Pillow hands that to another program
THUMBNAIL = 96  # px: the longer side of a thumbnail
LARGEST_PICTURE = 100_000_000  # pixels: more is a fault or an attack, and would take the machine's memory


@dataclass(frozen=True)
class Fit:
    """How much of the rows goes onto the page."""

    rows: int = 60
    pictures: int = 40
    head: int = 300  # characters of a text shown at once
    tail: int = 1500  # characters more behind a disclosure


def flipped_rows(record: Record, fit: Fit) -> dict[str, Any]:
    """The rows that changed sides, by harm: broken first, then fixed, then otherwise changed."""
    if samples := [row for row in map(mapping, sequence(record.evidence.get("samples"))) if row]:
        return sampled_rows(record, samples, fit)
    flips = mapping(record.evidence.get("flips"))
    examples = [row for row in map(mapping, sequence(flips.get("examples"))) if row]
    if not examples:
        reason = (
            "no row changed sides"
            if flips.get("fixed") == 0 == flips.get("broken")
            else "the evidence holds no examples"
        )
        return {
            "answer": reason.capitalize() + "." if reason.startswith("no row") else f"not measured: {reason}",
            "kinds": [],
        }
    quotas = _quotas(examples, fit.rows)
    pictures = Pictures(record.folder, fit.pictures)
    kinds: list[dict[str, Any]] = []
    for kind, title, meaning in KINDS:
        of_kind = [row for row in examples if row.get("kind") == kind]
        total = max(len(of_kind), int(flips[kind]) if words.is_number(flips.get(kind)) else 0)
        shown = [_example(row, fit, pictures) for row in of_kind[: quotas[kind]]]
        if total:
            kinds.append({"kind": kind, "title": title, "meaning": meaning, "total": words.count(total), "rows": shown,
                          "more": words.plural(total - len(shown), "more row") if total > len(shown) else "",
                          "with_image": any(row["image"] or row["image_reason"] for row in shown)})  # fmt: skip
    said = ", ".join(f"{kind['title'].lower()} {kind['total']}" for kind in kinds)
    return {"answer": f"{said[:1].upper()}{said[1:]}. What broke comes first.", "kinds": kinds}


def sampled_rows(record: Record, samples: Sequence[Mapping[str, Any]], fit: Fit) -> dict[str, Any]:
    """Answers of both models side by side, where no answer is simply right or wrong."""
    pictures = Pictures(record.folder, fit.pictures)
    shown = [_example(row, fit, pictures) for row in samples[: fit.rows]]
    same = sum(row.get("base") == row.get("tuned") for row in samples)
    answer = f"The first {words.plural(len(samples), 'held-out row')} side by side; both models say the same in {same}."
    kind = {"kind": "sample", "title": "Side by side", "meaning": "in the order of the data, not chosen",
            "total": words.count(len(samples)), "rows": shown,
            "more": words.plural(len(samples) - len(shown), "more row") if len(samples) > len(shown) else "",
            "with_image": any(row["image"] or row["image_reason"] for row in shown)}  # fmt: skip
    return {"answer": answer, "kinds": [kind]}


def _quotas(examples: Sequence[Mapping[str, Any]], total: int) -> dict[str, int]:
    """How many of each kind are shown: half for broken, what is left over goes on to the next."""
    present = {kind: sum(row.get("kind") == kind for row in examples) for kind, _, _ in KINDS}
    others = sum(present.values()) - present["broken"]
    broken = min(present["broken"], max(total // 2, total - others))
    fixed = min(present["fixed"], total - broken)
    return {"broken": broken, "fixed": fixed, "changed": min(present["changed"], total - broken - fixed)}


def _example(row: Mapping[str, Any], fit: Fit, pictures: Pictures) -> dict[str, Any]:
    image, reason = pictures.thumbnail(row["image"]) if row.get("image") else ("", "")
    texts = {key: _passage(row.get(key), fit) for key in ("input", "truth", "base", "tuned")}
    texts["tuned"]["parts"] = _differing(texts["base"]["head"], texts["tuned"]["head"])
    score = row.get("score")
    sure = _sure(score) if words.is_number(score) and 0 <= score <= 1 else ""
    return {"row": str(row.get("row", "")), "image": image, "image_reason": reason, "sure": sure, **texts}


def _sure(score: float) -> str:
    return "> 99% sure" if score > 0.99 else f"{100 * score:.0f}% sure"


def _differing(base: str, tuned: str) -> list[tuple[bool, str]]:
    """`tuned` in pieces, with True for what `base` has not; only where both are longer than a label."""
    before, after = WORDS.findall(base), WORDS.findall(tuned)
    if min(len(before), len(after)) < LABEL_WORDS:
        return [(False, tuned)]
    steps = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [(kind != "equal", "".join(after[start:end])) for kind, _, _, start, end in steps if end > start]


def _passage(value: Any, fit: Fit) -> dict[str, Any]:
    """A text as it stands on the page: its head, the rest behind a disclosure, and what was left out for size."""
    whole = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    head, rest = words.cut(whole, fit.head)
    shown, lost = words.cut(rest, fit.tail) if fit.tail else ("", rest)
    return {
        "head": head,
        "parts": [(False, head)],
        "rest": shown,
        "length": words.count(len(rest)),
        "lost": words.count(len(lost)) if lost else "",
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
