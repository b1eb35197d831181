"""Messy text: eight edits that leave the right answer as it is, in five strengths. Pure functions of (text, rng).

Knows strings only. No digit changes its value, no protected word its letters. What an edit does at one strength it
also does at the next, for a generator that starts alike: the places are drawn in one order, and more of them taken.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection

import numpy as np

Rng = np.random.Generator
Place = tuple[int, int, str]  # what stands from here to there becomes this

SEVERITIES = (1, 2, 3, 4, 5)
SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)  # of the places that could be edited; at least one from strength 1 on
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
LONG_ENOUGH = 4  # letters: in a shorter word a slip makes another word (not, now)
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of an English keyboard
NEIGHBOURS = {
    letter: [row[j] for j in (i - 1, i + 1) if 0 <= j < len(row)] for row in ROWS for i, letter in enumerate(row)
}
NUMBER = re.compile(r"(?<![\w.,:/#+-])(\d{1,3}(?:,\d{3})+|\d{4,7})(?![\w:/-])(?![.,]\d)")
YEAR = re.compile(r"(1[5-9]|20)\d\d")
CONTRACTIONS = {
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "is not": "isn't", "are not": "aren't",
    "was not": "wasn't", "were not": "weren't", "has not": "hasn't", "have not": "haven't", "had not": "hadn't",
    "cannot": "can't", "could not": "couldn't", "should not": "shouldn't", "would not": "wouldn't",
    "will not": "won't", "i am": "I'm", "i have": "I've", "i will": "I'll", "you are": "you're", "we are": "we're",
    "they are": "they're", "it is": "it's", "that is": "that's", "there is": "there's",
}  # fmt: skip
EXPANSIONS = {
    short.lower(): long for long, short in CONTRACTIONS.items() if not short.endswith("'s")
}  # 's may be owning


def perturb(text: str, edit: str, severity: int, rng: Rng, keep: Collection[str] = ()) -> str:
    """The text with one kind of edit; severity 0 is the text itself, 5 touches half of the places.

    keep: words, in lower case, whose letters stay (label names). A text without a place for this edit stays as it is.
    """
    if severity == 0:
        return text
    places = EDITS[edit](text, rng, frozenset(keep))
    some = round(SHARES[severity] * len(places))
    chosen = rng.permutation(len(places))[: max(1, some)]
    for start, end, new in sorted((places[int(i)] for i in chosen), reverse=True):
        text = text[:start] + new + text[end:]
    return text


# ------------------------------------------------------------------- slips of the hand
def _words(text: str, keep: Collection[str]) -> list[re.Match[str]]:
    """Words long enough to stay readable with a slip, without those to be kept."""
    found = (match for match in WORD.finditer(text) if len(match[0]) >= LONG_ENOUGH)
    return [match for match in found if match[0].lower() not in keep and match[0].isalpha()]


def typos(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """Two inner letters change places, or one becomes its neighbour on the keyboard."""
    places = []
    for match in _words(text, keep):
        word = match[0]
        at = int(rng.integers(1, len(word) - 2))
        near = NEIGHBOURS.get(word[at].lower())
        if rng.random() < 0.5 and word[at] != word[at + 1]:
            new = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif near:
            letter = near[int(rng.integers(len(near)))]
            new = word[:at] + (letter.upper() if word[at].isupper() else letter) + word[at + 1 :]
        else:
            continue
        places.append((match.start(), match.end(), new))
    return places


def missing_letters(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """An inner letter is left out."""
    drawn = ((match, int(rng.integers(1, len(match[0]) - 1))) for match in _words(text, keep))
    return [(match.start() + at, match.start() + at + 1, "") for match, at in drawn]


def repeated_letters(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """A letter is typed twice."""
    drawn = ((match, int(rng.integers(1, len(match[0])))) for match in _words(text, keep))
    return [(match.start() + at, match.start() + at, match[0][at]) for match, at in drawn]


# -------------------------------------------------------------------- case, blanks, signs
def case(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """A word in capitals, or in small letters where it has capitals; also kept words: their letters stay."""
    places = []
    for match in WORD.finditer(text):
        word = match[0]
        new = word.lower() if word != word.lower() else word.upper()
        if new != word and len(new) == len(word):
            places.append((match.start(), match.end(), new))
    return places


def spaces(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """A blank between two words of letters is doubled or forgotten; beside a number or a kept word only doubled."""
    places = []
    for one, two in itertools.pairwise(re.finditer(r"\S+", text)):
        if text[one.end() : two.start()] != " ":
            continue
        letters = one[0][-1].isalpha() and two[0][0].isalpha()
        kept = {word.lower() for word in WORD.findall(f"{one[0]} {two[0]}")} & set(keep)
        forgotten = rng.random() < 0.5 and letters and not kept
        places.append((one.end(), two.start(), "" if forgotten else "  "))
    return places


def punctuation(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """A sign after a word is left out or repeated, or a full stop set where a text ends without one.

    A question mark stays, and so does what stands beside a digit.
    """
    places = []
    for match in re.finditer(r"(?<=[^\W\d_])[.,;:!](?=\s|$)", text):
        places.append((match.start(), match.end(), "" if rng.random() < 0.5 else 2 * match[0]))
    return places or ([(len(text), len(text), ".")] if text[-1:].isalpha() else [])


# ------------------------------------------------------------------- another way to write it
def contractions(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """`do not` as `don't`, and the other way round. English."""
    places = []
    for long, short in CONTRACTIONS.items():
        for match in re.finditer(rf"\b{long}\b", text, re.IGNORECASE):
            places.append((match.start(), match.end(), _cased(short, match[0])))
    for short, long in EXPANSIONS.items():
        for match in re.finditer(rf"\b{short.replace(chr(39), '[' + chr(39) + '’]')}\b", text, re.IGNORECASE):
            places.append((match.start(), match.end(), _cased(long, match[0])))
    return _apart(places)


def _cased(new: str, old: str) -> str:
    """The new words written as the old ones began."""
    if len(old) > 3 and old.isupper():
        return new.upper()
    return (new[0].upper() if old[0].isupper() else new[0].lower()) + new[1:]


def _apart(places: list[Place]) -> list[Place]:
    """Without places that overlap an earlier one."""
    kept: list[Place] = []
    for place in sorted(places):
        if not kept or place[0] >= kept[-1][1]:
            kept.append(place)
    return kept


def number_format(text: str, rng: Rng, keep: Collection[str]) -> list[Place]:
    """12000 as 12,000, and the other way round; what may be a year, a date, a time or a code is left alone."""
    places = []
    for match in NUMBER.finditer(text):
        digits = match[0].replace(",", "")
        if digits.startswith("0") or YEAR.fullmatch(match[0]):
            continue
        places.append((match.start(), match.end(), digits if "," in match[0] else f"{int(digits):,}"))
    return places


EDITS: dict[str, Callable[[str, Rng, Collection[str]], list[Place]]] = {
    "typos": typos,
    "missing letters": missing_letters,
    "repeated letters": repeated_letters,
    "case": case,
    "spaces": spaces,
    "punctuation": punctuation,
    "contractions": contractions,
    "number format": number_format,
}
