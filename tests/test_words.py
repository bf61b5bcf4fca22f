"""Words of plain texts: all of the text is in them, and they are those of a treebank."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfit.words import find_words

TEXTS = st.text(st.sampled_from(string.ascii_letters + " .,!?'\"()$é中\n\t-"), max_size=40)


def words(text):
    return [text[begin:end] for begin, end in find_words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My bike broke.", ["My", "bike", "broke", "."]),
        ('He said: "No!"', ["He", "said", ":", '"', "No", "!", '"']),
        ("Mr. Hill, of the U.S., paid $3.50...", [
            "Mr.", "Hill", ",", "of", "the", "U.S.", ",", "paid", "$", "3.50", "..."]),
        ("don't (re-send) e-mails :-)", ["don't", "(", "re-send", ")", "e-mails", ":-)"]),
        ("It was on.", ["It", "was", "on", "."]),
        ("I saw Bob. \n", ["I", "saw", "Bob", "."]),  # no text follows
        ("  \n ", []),
    ],
)  # fmt: skip
def test_punctuation_at_the_edges_of_words_stands_alone(text, expected):
    assert words(text) == expected


@given(TEXTS)
def test_every_character_but_white_space_is_in_one_word(text):
    covered = [i for begin, end in find_words(text) for i in range(begin, end)]
    assert covered == [i for i, character in enumerate(text) if not character.isspace()]


@given(TEXTS)
def test_words_hold_no_white_space_and_are_not_empty(text):
    assert all(word and not any(c.isspace() for c in word) for word in words(text))


def test_most_words_of_a_treebank_are_found_in_its_texts(real_data):
    """UD English EWT, dev: the rest are ``do n't``, ``Hill 's`` and the like."""
    found = right = plain = gold = 0
    for text, expected in sentences(real_data("ud_ewt") / "en_ewt-ud-dev.conllu"):
        places, pieces = set(find_words(text)), set(expected)
        right += len(places & pieces)
        found, gold = found + len(places), gold + len(pieces)
        plain += sum(
            (b == 0 or text[b - 1] == " ") and (e == len(text) or text[e] == " ") for b, e in pieces
        )
    assert gold > 20_000
    assert plain / gold < 0.75  # between white space, for comparison
    assert right / gold > 0.94
    assert right / found > 0.96


def sentences(path):
    """Yield each text of a CoNLL-U file and where its words are in it."""
    text, places, position = "", [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# text = "):
            text, places, position = line.removeprefix("# text = "), [], 0
        elif not line:
            yield text, places
        elif (cells := line.split("\t"))[0].isdigit():
            begin = text.find(cells[1], position)
            assert begin >= 0
            position = begin + len(cells[1])
            places.append((begin, position))
