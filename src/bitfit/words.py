"""The words of a plain text, for tasks that label words.

Data for tagging has its punctuation as words of its own (treebanks, CoNLL), and a text as people
write it has not.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r"\S+")
_CORE = re.compile(r"\w(?:.*\w)?", re.DOTALL)
_MARKS = re.compile(r"\.+|.", re.DOTALL)
_INITIALS = re.compile(r"(?:[^\W\d]{1,2}\.)+[^\W\d]{1,2}")  # "U.S", "Ph.D"
# "Mr.", "St.", "Jan.": as long as this, and with a capital, a word keeps the period after it.
_ABBREVIATION = 3


def find_words(text: str) -> list[tuple[int, int]]:
    """Return where each word of ``text`` begins and ends, in characters.

    Words stand between white space; punctuation at their edges is words of its own, each mark one
    (``...`` is one). A period stays with initials (``U.S.``) and with a short one
    that begins with a capital, if more text follows (``Mr. Hill``). What is inside a word stays
    (``don't``, ``e-mail``, ``3.5``): where the data splits such words, give them split.
    """
    found = []
    last = len(text.rstrip())
    for piece in _PIECE.finditer(text):
        found += _split(text, *piece.span(), more=piece.end() < last)
    return found


def _split(text: str, begin: int, end: int, *, more: bool) -> list[tuple[int, int]]:
    """Return the words of a piece without white space; ``more``: text follows."""
    core = _CORE.search(text, begin, end)
    if core is None:  # marks only: ":-)", "--"
        return [(begin, end)]
    first, last = core.span()
    if re.match(r"\.(?!\.)", text[last:end]) and _keeps_period(core.group(), more=more):
        last += 1
    before = [mark.span() for mark in _MARKS.finditer(text, begin, first)]
    after = [mark.span() for mark in _MARKS.finditer(text, last, end)]
    return [*before, (first, last), *after]


def _keeps_period(word: str, *, more: bool) -> bool:
    return _INITIALS.fullmatch(word) is not None or (
        more and len(word) <= _ABBREVIATION and word[0].isupper()
    )
