"""Are the archives that pip installed the ones we tested with? Compares pip's report with hashes.txt.

    python .ci/archives.py REPORT.json [REPORT.json ...]            ends with 1 where an archive has another SHA-256
    python .ci/archives.py --write REPORT.json [REPORT.json ...]    writes hashes.txt anew

An archive is known by its file name. One that is not in hashes.txt belongs to another platform, interpreter or version:
it is counted and named, and no fault, because the ranges of pyproject.toml are wide on purpose. Knows nothing of
advisories: `make audit` asks for those over a network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import unquote

LIST = Path(__file__).parents[1] / "hashes.txt"


def installed(reports: list[Path]) -> dict[str, str]:
    """File name -> SHA-256 of every archive in pip's reports (`pip install --report`); folders have none."""
    found = {}
    for report in reports:
        for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
            info = item["download_info"]
            if "archive_info" in info:
                found[unquote(info["url"].rpartition("/")[2])] = info["archive_info"]["hashes"]["sha256"]
    return found


def known() -> dict[str, str]:
    lines = [line.split() for line in LIST.read_text(encoding="utf-8").splitlines()]
    return {name: digest for digest, name in lines}


def compared(found: dict[str, str], expected: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names whose bytes differ, and names that are not listed."""
    other = sorted(name for name, digest in found.items() if expected.get(name, digest) != digest)
    return other, sorted(found.keys() - expected.keys())


def main(words: list[str]) -> int:
    found = installed([Path(word) for word in words if word != "--write"])
    if "--write" in words:
        LIST.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(found.items())), encoding="utf-8")
        return 0
    other, unlisted = compared(found, known())
    print(f"{len(found)} archives: {len(found) - len(other) - len(unlisted)} as listed in {LIST.name}")
    if unlisted:
        print(f"{len(unlisted)} not listed (another platform or version): {', '.join(unlisted)}")
    for name in other:
        print(f"{name}: SHA-256 {found[name]}, expected {known()[name]}. Do not use this environment.")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
