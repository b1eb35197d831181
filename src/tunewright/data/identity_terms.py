"""Words that say who somebody is, in pairs, and a text with them exchanged. English; our own short list.

Knows strings only. Whole words, in the case they stand in; a text is exchanged by one kind of term at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

GENDER = {
    "he": "she", "himself": "herself", "man": "woman", "men": "women", "boy": "girl", "boys": "girls",
    "father": "mother", "fathers": "mothers", "dad": "mum", "son": "daughter", "sons": "daughters",
    "brother": "sister", "brothers": "sisters", "husband": "wife", "husbands": "wives", "uncle": "aunt",
    "nephew": "niece", "grandfather": "grandmother", "boyfriend": "girlfriend", "gentleman": "lady",
    "gentlemen": "ladies", "king": "queen", "prince": "princess", "actor": "actress", "waiter": "waitress",
    "sir": "madam", "mr": "mrs", "male": "female", "males": "females",
}  # fmt: skip
NAMES = {
    "Anna": "Fatima", "Emma": "Aisha", "Julia": "Mei", "Laura": "Priya", "Sarah": "Zeynep", "Susan": "Ngozi",
    "Linda": "Lakshmi", "Karen": "Guadalupe", "Helen": "Yuki", "Alice": "Amina", "James": "Mohammed",
    "Michael": "Ahmed", "Thomas": "Hiroshi", "David": "Kwame", "Peter": "Rajesh", "John": "Jorge",
    "Paul": "Abdul", "Robert": "Carlos", "William": "Wei", "Daniel": "Dmitri", "Steven": "Tariq", "Chris": "Hassan",
}  # fmt: skip
ORIGIN = {
    "Germany": "Nigeria", "France": "Turkey", "England": "India", "Sweden": "Kenya", "Italy": "Iran",
    "Spain": "Vietnam", "Canada": "Pakistan", "America": "Mexico", "Norway": "Ghana", "Austria": "Syria",
    "German": "Nigerian", "French": "Turkish", "English": "Indian", "Swedish": "Kenyan", "Italian": "Iranian",
    "Spanish": "Vietnamese", "Canadian": "Pakistani", "American": "Mexican", "European": "African",
    "Germans": "Nigerians", "Italians": "Iranians", "Americans": "Mexicans", "Europeans": "Africans",
}  # fmt: skip
RELIGION = {
    "Christian": "Muslim", "Christians": "Muslims", "church": "mosque", "churches": "mosques", "priest": "imam",
    "Bible": "Quran", "Christianity": "Islam", "Jewish": "Hindu", "synagogue": "temple", "Catholic": "Buddhist",
    "Catholics": "Buddhists",
}  # fmt: skip
ALWAYS_CAPITAL = {"names", "origin"}  # `chris` or `turkey` in small letters may be another word
# "her" is two words: before one of these, or before no word, it is "him", else "his"
NOT_HERS = frozenset({
    "a", "an", "and", "as", "at", "but", "by", "for", "from", "how", "if", "in", "into", "is", "of", "on", "or", "so",
    "than", "that", "the", "then", "this", "to", "too", "was", "what", "when", "where", "which", "while", "who", "why",
    "with", "again", "away", "back", "down", "here", "now", "off", "out", "over", "there", "today", "up", "yesterday",
})  # fmt: skip


def _both_ways(pairs: Mapping[str, str]) -> dict[str, str]:
    return dict(pairs) | {new: old for old, new in pairs.items()}


TERMS: dict[str, dict[str, str]] = {
    # "his" and "him" both come back from "her", which exchange() reads from the words around it
    "gender": _both_ways(GENDER) | {"his": "her", "him": "her", "her": "his", "hers": "his", "ms": "mr", "mom": "dad"},
    "names": _both_ways(NAMES),
    "origin": _both_ways(ORIGIN),
    "religion": _both_ways(RELIGION),
}
_FOLDED = {
    kind: terms if kind in ALWAYS_CAPITAL else {old.lower(): new for old, new in terms.items()}
    for kind, terms in TERMS.items()
}
_WORDS = {
    kind: re.compile(
        r"\b(" + "|".join(sorted(map(re.escape, terms), key=len, reverse=True)) + r")\b",
        re.NOFLAG if kind in ALWAYS_CAPITAL else re.IGNORECASE,
    )
    for kind, terms in TERMS.items()
}


def exchange(text: str, kind: str) -> tuple[str, list[str]]:
    """The text with every term of this kind replaced by its partner, and the terms found; [] where there is none."""
    found: list[str] = []

    def partner(match: re.Match[str]) -> str:
        old = match[0]
        found.append(old)
        if kind == "gender" and old.lower() == "her":
            after = re.match(r"\s+([^\W\d_]+)", text[match.end() :])
            return cased("his" if after and after[1].lower() not in NOT_HERS else "him", old)
        return cased(_FOLDED[kind][old if kind in ALWAYS_CAPITAL else old.lower()], old)

    return _WORDS[kind].sub(partner, text), found


def cased(new: str, old: str) -> str:
    """The new word with the old one's capitals."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[0].upper() + new[1:] if old[0].isupper() else new.lower()
