"""Plain text (.txt): one row is a stretch of whole paragraphs of up to 2,000 characters. Knows no task.

Paragraphs are what blank lines part. Rows are named by the line they begin at; joined in order they are the text
again, but for blank lines and for white space at the ends of cut paragraphs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tunewright.data.raw import RawRow, Table
from tunewright.data.texts import Text, read_text
from tunewright.errors import Fault

SUFFIXES = (".txt",)
MOST = 2000  # characters of a row: 300 to 1,000 tokens, so that held-out rows are many and rows still have context


def read(path: Path) -> Table:
    """All rows of the file, with one column "text"."""
    text, notes, faults = read_text(path)
    table = Table(root=path.parent, columns=("text",), notes=notes, faults=faults)
    cuts: Counter[str] = Counter()
    for line, chunk in _chunks(_pieces(text, cuts)):
        row, where = f"{path.name}:{line}", f"{path.name} line {line}"
        while table.rows and table.rows[-1].row.split("+")[0] == row:  # one endless line gives several rows
            row = f"{row.split('+')[0]}+{int(table.rows[-1].row.partition('+')[2] or 0) + 1}"
        table.rows.append(RawRow(row, where, {"text": chunk}))
    if not table.rows and not faults:
        table.faults.append(Fault("the file has no text", path.name, got="blank lines only"))
    if table.rows:
        table.notes.append(f"plain text: {len(table.rows)} rows of whole paragraphs, up to {MOST} characters each")
    if num_cut := cuts["pieces"] - cuts["paragraphs"]:
        table.notes.append(
            f"{num_cut} cuts inside paragraphs of more than {MOST} characters, at ends of lines or words"
        )
    return table


def _pieces(text: Text, cuts: Counter[str]) -> Iterator[tuple[int, str]]:
    """(line, piece) of all paragraphs; counts both."""
    for line, paragraph in _paragraphs(text):
        cuts["paragraphs"] += 1
        for piece in _cut(line, paragraph):
            cuts["pieces"] += 1
            yield piece


def _paragraphs(text: Text) -> Iterator[tuple[int, str]]:
    """(number of its first line, paragraph), line ends as they were made equal by `\\n`."""
    with text.open("\n") as stream:
        ended = (line[:-2] if line.endswith("\r\n") else line.removesuffix("\n") for line in stream)
        yield from _joined(itertools.chain(ended, [""]))


def _joined(every_line: Iterable[str]) -> Iterator[tuple[int, str]]:
    start, lines = 1, list[str]()
    for number, line in enumerate(every_line, 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, "\n".join(lines)
            lines = []


def _cut(line: int, paragraph: str) -> Iterator[tuple[int, str]]:
    """The paragraph, or its pieces if it is too long: cut at the last line end that fits, else blank, else anywhere."""
    while len(paragraph) > MOST:
        at = max(paragraph.rfind("\n", 1, MOST + 1), 0) or max(paragraph.rfind(" ", 1, MOST + 1), 0) or MOST
        if paragraph[:at].strip():
            yield line, paragraph[:at]
        line += paragraph[: at + 1].count("\n")
        paragraph = paragraph[at:].lstrip("\n")
    if paragraph.strip():
        yield line, paragraph


def _chunks(pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Neighbours joined by a blank line as long as they fit."""
    start, chunk = 0, ""
    for line, piece in pieces:
        if chunk and len(chunk) + 2 + len(piece) > MOST:
            yield start, chunk
            chunk = ""
        start, chunk = (start, f"{chunk}\n\n{piece}") if chunk else (line, piece)
    if chunk:
        yield start, chunk
