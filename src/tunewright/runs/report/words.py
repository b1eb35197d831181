"""Numbers said the way people read them: three digits at most, points for shares, a real minus sign.

Knows no run and no HTML. Everything here is text in, text out; escaping is the page's work.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

MINUS = "\u2212"
DIGITS = 3  # more digits than this claim a certainty that no test set of ours has
UNKNOWN = "not measured"
SHORT_FORMS = {form.lower(): form for form in ("F1", "AUC", "WER", "CER", "IoU", "KL", "ECE", "mAP", "SHA-256")} | {
    "rougel": "ROUGE-L"
}
HYPHEN = re.compile(r"(?<![\w.,-])-(?=\d)")
BACKTICKS = re.compile(r"`([^`\n]+)`")
INTERVAL = re.compile(rf"([+{MINUS}]?\d[\d.,]*) to ([+{MINUS}]?\d)")


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float; a bool is not a number here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """A measured value with at most three significant digits: 0.123, 45.6, 1,230, 1.2e-05."""
    if not is_number(value):
        return UNKNOWN
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e9:
        mantissa, exponent = f"{size:.{DIGITS - 1}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        rounded = float(f"{size:.{DIGITS}g}")
        decimals = max(0, DIGITS - 1 - math.floor(math.log10(rounded)))
        text = f"{rounded:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return (MINUS if value < 0 else "") + text


def count(value: Any) -> str:
    """How many: exact, with thousands set apart."""
    return f"{int(value):,}" if is_number(value) else UNKNOWN


def large(value: Any) -> str:
    """How many, where the size says more than the last digit: 22.7 million."""
    if not is_number(value):
        return UNKNOWN
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{number(value / size)} {word}"
    return count(value)


def plural(amount: Any, one: str, many: str = "") -> str:
    """`1 row`, `2 rows`."""
    return f"{count(amount)} {one if amount == 1 else many or one + 's'}"


def share(value: Any) -> str:
    """A share in [0, 1] as percent; never rounds up to 100% or down to 0% what is neither."""
    if not is_number(value):
        return UNKNOWN
    if 0.999 < value < 1:
        return "> 99.9%"
    if 0 < value < 0.001:
        return "< 0.1%"
    return f"{_one_decimal(100 * value)}%" if value < 1 else f"{number(100 * value)}%"


def axis_share(value: float) -> str:
    """A round share on an axis: 20%, 2.5%."""
    return f"{number(100 * round(value, 9))}%"


def axis_points(value: float) -> str:
    """A round difference of shares on an axis: +2, 0, −0.5."""
    return change(100 * round(value, 9))


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def sentence(text: Any) -> str:
    """A sentence as print sets it: real minus signs, and an interval that does not break over two lines."""
    return INTERVAL.sub("\\1\u00a0to\u00a0\\2", HYPHEN.sub(MINUS, str(text)))


def points(difference: Any, unit: bool = True) -> str:
    """A difference of shares as signed points: 0.082 is `+8.2 points`."""
    if not is_number(difference):
        return UNKNOWN
    return signed(_one_decimal(abs(100 * difference)), difference) + (" points" if unit else "")


def change(difference: Any) -> str:
    """A difference on the metric's own scale, with its sign."""
    return signed(number(abs(difference)), difference) if is_number(difference) else UNKNOWN


def signed(size: str, value: float) -> str:
    """`size` with the sign of `value`; what rounds to zero carries none."""
    if not size.strip("0."):
        return size
    return ("+" if value > 0 else MINUS) + size


def _one_decimal(value: float) -> str:
    size = abs(value)
    text = f"{size:.2g}" if 0 < size < 0.05 else f"{size:.1f}" if size < 99.95 else number(size)
    return (MINUS if value < 0 else "") + text


def duration(seconds: Any) -> str:
    """Seconds as people say them: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    if not is_number(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{number(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def size(num_bytes: Any) -> str:
    """Bytes in the unit that keeps the number short."""
    if not is_number(num_bytes):
        return UNKNOWN
    amount = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(amount) < 1000:
            return f"{number(amount)} {unit}"
        amount /= 1024
    return f"{number(amount)} TiB"


def name(identifier: Any) -> str:
    """`macro_f1` as `macro F1`, `log_loss` as `log loss`: a metric's name in running text."""
    text = str(identifier).replace("_", " ")
    return " ".join(SHORT_FORMS.get(word.lower(), word) for word in text.split())


def code_parts(text: Any) -> list[tuple[bool, str]]:
    """A sentence in pieces, with True for what stands between backticks: commands, as people type them."""
    return [(place % 2 == 1, part) for place, part in enumerate(BACKTICKS.split(str(text))) if part]


def cut(text: Any, limit: int) -> tuple[str, str]:
    """A text as (head, rest): at most `limit` characters, then what follows. Cuts at a space where one is near."""
    whole = str(text)
    if len(whole) <= limit:
        return whole, ""
    space = whole.rfind(" ", limit - 40, limit)
    at = space if space > 0 else limit
    return whole[:at], whole[at:]


def short(text: Any, limit: int) -> str:
    """One line, cut with an ellipsis: for labels in charts."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
