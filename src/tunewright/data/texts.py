"""Bytes become text here, because every text reader owes them the same care. Knows no file format and no row.

A text is read through, as often as need be, and stands nowhere whole: it may be larger than the memory.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from tunewright.errors import Fault

BLOCK = 1 << 20  # bytes or characters at once
BOMS = (  # the longer ones first: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)


@dataclass(frozen=True)
class Text:
    """A text that can be begun again as often as wanted. False where there is nothing in it."""

    source: Path | bytes  # bytes of what can be read only once, such as a pipe
    encoding: str = "utf-8"
    errors: str = "strict"  # "replace": U+FFFD stands for what is not valid

    def __bool__(self) -> bool:
        return self.source != b""

    def open(self, newline: str = "") -> TextIO:
        """A stream of it. newline: as in Python's `open`; line ends stay as they are."""
        return io.TextIOWrapper(_binary(self.source), self.encoding, self.errors, newline)

    def pieces(self) -> Iterator[str]:
        with self.open() as stream:
            while piece := stream.read(BLOCK):
                yield piece

    def lines(self) -> Iterator[str]:
        """Lines without their end; only \\n ends one: U+2028 may stand inside a JSON string."""
        with self.open("\n") as stream:
            for line in stream:
                yield line.removesuffix("\n")

    def whole(self) -> str:
        with self.open() as stream:
            return stream.read()


def read_text(path: Path) -> tuple[Text, list[str], list[Fault]]:
    """A text file as (text, notes, faults); UTF-8, or what its byte order mark says.

    Where bytes are not valid the text comes all the same, with U+FFFD in their place, so that other faults are found.
    """
    if path.is_dir():
        return Text(b""), [], [Fault("this is a folder", where=path.name, expected="a file")]
    try:
        source = path if path.is_file() else path.read_bytes()
        with _binary(source) as file:
            start = file.read(1000)
    except OSError as error:
        return Text(b""), [], [Fault(f"the file cannot be read ({error.strerror})", where=path.name)]
    if not start:
        return Text(b""), [], [Fault("the file is empty (0 bytes)", path.name, remedy="Was it copied to its end?")]
    mark, encoding, spoken = next((b for b in BOMS if start.startswith(b[0])), (b"", "utf-8", ""))
    notes = [f"begins with a byte order mark: read as {spoken}"] if mark else []
    if start == mark:
        return Text(b""), notes, []
    if not mark and start.count(0) > len(start) * 0.3:
        problem = "every second byte is NUL: this looks like UTF-16 without a byte order mark"
        return Text(b""), [], [Fault(problem, path.name, expected="UTF-8", remedy=_convert("UTF-16LE", path))]
    if _is_valid(source, encoding):
        return Text(source, encoding), notes, []
    raw = source if isinstance(source, bytes) else source.read_bytes()
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        return Text(source, encoding, "replace"), notes, [_undecodable(path, raw, error)]
    return Text(raw, encoding), notes, []


def _binary(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _is_valid(source: Path | bytes, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with _binary(source) as file:
            while block := file.read(BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _undecodable(path: Path, raw: bytes, error: UnicodeDecodeError) -> Fault:
    start, line = error.start, raw.count(b"\n", 0, error.start) + 1
    where = f"{path.name} line {line}"
    problem = f"byte 0x{raw[start]:02x} at offset {start} is not valid {error.encoding.upper()}"
    if error.end >= len(raw) and error.reason in ("unexpected end of data", "truncated data"):
        return Fault(problem, where, remedy="The file ends inside a character: it may be cut off.")
    bad = sum(not _is_utf8(piece) for piece in raw.split(b"\n")) if error.encoding.startswith("utf-8") else 1
    around = raw[max(0, start - 15) : start + 15].decode("cp1252", errors="replace").strip()
    return Fault(
        problem,
        where,
        expected="UTF-8",
        got=f'{bad} such line{"s" if bad > 1 else ""}; read as latin-1 the place says "{" ".join(around.split())}"',
        remedy=f"It looks like latin-1 (cp1252). {_convert('CP1252', path)}",
    )


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _convert(encoding: str, path: Path) -> str:
    return f"Save it as UTF-8, or convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"
