"""What runs share on the disk: shown, and taken away. Knows the cache's folder; no torch."""

from __future__ import annotations

import time
from typing import Any

from tunewright.engine import cache_folder
from tunewright.errors import Fault, UserError


def listing() -> dict[str, Any]:
    """The folder, its limit, and one entry for each trunk whose activations are kept; why it is off, if it is."""
    place = cache_folder.place()
    entries = cache_folder.entries(place)
    total = sum(entry["bytes"] for entry in entries)
    found = {"folder": str(place), "bytes": total, "limit": cache_folder.LIMIT, "entries": entries}
    return found | ({"off": cache_folder.is_off()} if cache_folder.is_off() else {})


def clear() -> dict[str, Any]:
    """Remove all of it. Runs under way go on: what they have open stays readable to them."""
    place = cache_folder.place()
    try:
        return {"folder": str(place), "freed": cache_folder.clear(place)}
    except OSError as error:
        raise UserError(Fault(f"cannot be cleared: {error.strerror}", where=str(error.filename or place))) from error


def as_text(found: dict[str, Any]) -> str:
    if "freed" in found:
        return f"{_megabytes(found['freed'])} freed in {found['folder']}."
    lines = [
        f"{entry['name']}  {_megabytes(entry['bytes']):>10}  last used {_day(entry['used'])}  "
        f"{entry.get('blocks', '?')} blocks of {entry.get('model', '?')} in {entry.get('precision', '?')}"
        for entry in found["entries"]
    ]
    whole = f"{_megabytes(found['bytes'])} of at most {_megabytes(found['limit'])} in {found['folder']}."
    return "\n".join([*lines, whole, *([f"Off: {found['off']}."] if "off" in found else [])])


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
