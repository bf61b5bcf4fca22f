"""CoNLL-U, CoNLL columns and the Penn Treebank."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfit.data import DataConfig, Dataset, read_dataset
from bitfit.errors import DataError, UsageError
from bitfit.tasks import BUILTIN_TASKS, builtin_task

CONLLU = """\
# sent_id = a-1
# text = I don't know
1\tI\tI\tPRON\tPRP\t_\t_\t_\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t_\t_\t_\t_
3\tn't\tnot\tPART\tRB\t_\t_\t_\t_\t_
3.1\tghost\t_\tX\tXX\t_\t_\t_\t_\t_
4\tknow\tknow\tVERB\tVB\t_\t_\t_\t_\t_

# sent_id = a-2
1\tYes\tyes\tINTJ\tUH\t_\t_\t_\t_\t_

"""


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def read(data: Path, **options: object) -> Dataset:
    return read_dataset(DataConfig(**{"data": data, "dev_fraction": 0.0, **options}))


def tagged(data: Dataset, split: str = "train") -> list[list[tuple[str, str]]]:
    names = data.task.labels
    return [
        [(word, names[tag]) for word, tag in zip(e.words, e.labels, strict=True)]
        for e in data.splits[split]
    ]


def test_conllu_takes_syntactic_words_only(tmp_path: Path) -> None:
    data = read(write(tmp_path / "x.conllu", CONLLU))
    assert tagged(data) == [
        [("I", "PRP"), ("do", "VBP"), ("n't", "RB"), ("know", "VB")],
        [("Yes", "UH")],
    ]
    assert [e.id for e in data.splits["train"]] == ["a-1", "a-2"]
    assert data.task.kind == "tokens"


def test_conllu_has_two_tag_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.conllu", CONLLU)
    assert tagged(read(path, token_column="upos"))[1] == [("Yes", "INTJ")]
    with pytest.raises(UsageError, match="xpos and upos"):
        read(path, token_column=4)


def test_conllu_without_xpos_points_to_upos(tmp_path: Path) -> None:
    path = write(tmp_path / "x.conllu", CONLLU.replace("\tUH\t", "\t_\t"))
    with pytest.raises(DataError, match=r"x\.conllu:11: no xpos tag; try token_column upos"):
        read(path)
    skipping = read(path, skip_bad_rows=True)
    assert (len(skipping.splits["train"]), skipping.skipped[0].line) == (1, 11)


@pytest.mark.parametrize("line", ["1\tword", "one\ta\ta\tX\tX\t_\t_\t_\t_\t_"])
def test_a_broken_conllu_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"x\.conllu:13: "):
        read(write(tmp_path / "x.conllu", CONLLU + line + "\n"))


def test_a_conllu_folder_has_its_splits_by_name(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write(tmp_path / f"en_x-ud-{split}.conllu", CONLLU)
    write(tmp_path / "README.md", "no data")
    assert list(read(tmp_path).splits) == ["train", "dev", "test"]
    write(tmp_path / "en_y-ud-dev.conllu", CONLLU)
    with pytest.raises(DataError, match="look like dev"):
        read(tmp_path)


def test_a_tag_of_dev_only_joins_the_tag_set(tmp_path: Path) -> None:
    write(tmp_path / "a-train.conllu", CONLLU)
    write(tmp_path / "a-dev.conllu", CONLLU.replace("\tUH\t", "\tNEW\t"))
    assert "NEW" in read(tmp_path).task.labels
    with pytest.raises(DataError, match=r'dev\.conllu:10: tag "NEW" is not one of'):
        read(tmp_path, labels=("PRP", "VBP", "RB", "VB", "UH"))


CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n"


def test_conll_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "eng.conll", CONLL)
    assert tagged(read(path)) == [[("EU", "B-ORG"), ("rejects", "O")], [("Peter", "B-PER")]]
    assert tagged(read(path, token_column=1))[1] == [("Peter", "NNP")]
    with pytest.raises(DataError, match=r"eng\.conll:3: 3 columns; .* column 7"):
        read(path, token_column=7)
    with pytest.raises(UsageError, match="numbered from 0"):
        read(path, token_column="upos")


POS = r"""
======================================

[ Pierre/NNP Vinken/NNP ]
,/,
[ 1\/2/CD years/NNS|NN ]
-LRB-/( AT\/T/NNP ./.

======================================

[ Mr./NNP Vinken/NNP ]
is/VBZ ./.
"""
FIRST = [
    ("Pierre", "NNP"), ("Vinken", "NNP"), (",", ","), ("1/2", "CD"), ("years", "NNS"),
    ("(", "("), ("AT/T", "NNP"), (".", "."),
]  # fmt: skip


def test_the_treebanks_tagged_files(tmp_path: Path) -> None:
    data = read(write(tmp_path / "wsj_0001.pos", POS))
    assert tagged(data)[0] == FIRST
    assert [word for word, _ in tagged(data)[1]] == ["Mr.", "Vinken", "is", "."]


def test_tagged_text_with_a_sentence_per_line(tmp_path: Path) -> None:
    data = read(write(tmp_path / "x.tagged", "The/DT cat/NN\nsat/VBD ./.\n"))
    assert tagged(data) == [[("The", "DT"), ("cat", "NN")], [("sat", "VBD"), (".", ".")]]


TREE = r"""
( (S (NP-SBJ (DT The) (NNP AT\/T) )
   (VP (VBD ran) (NP (-NONE- *T*-1) ) (-LRB- -LRB-) (-RRB- -RRB-))
   (. .) ))
( (FRAG (-NONE- *)) )
((S (UH Yes)))
"""


def test_the_treebanks_trees(tmp_path: Path) -> None:
    data = read(write(tmp_path / "wsj_0001.mrg", TREE))
    assert tagged(data) == [
        [("The", "DT"), ("AT/T", "NNP"), ("ran", "VBD"), ("(", "-LRB-"), (")", "-RRB-"),
         (".", ".")],
        [("Yes", "UH")],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.mrg", "( (S (NN a)\n", r"x\.mrg:1: a bracket is opened here"),
        ("x.mrg", "( (S (NN a)))\n)\n", r"x\.mrg:2: \"\)\" outside"),
        ("x.pos", "a/NN\nb\n", r'x\.pos:2: "b" is not word/TAG'),
        ("x.pos", "\n", r"x\.pos: no sentences"),
        ("x.mrg", "(" * 100_000, r"never closed"),
    ],
)
def test_a_broken_treebank_file_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_the_sections_of_the_journal_make_the_splits(tmp_path: Path) -> None:
    for section in (0, 18, 19, 21, 22, 24):
        name = f"wsj/{section:02}/wsj_{section:02}01"
        write(tmp_path / f"{name}.pos", f"s{section}/NN ./.\n")
    write(tmp_path / "brown/cf/cf01.pos", "no/NN ./.\n")
    data = read(tmp_path)
    words = {split: [e.words[0] for e in part] for split, part in data.splits.items()}
    assert words == {"train": ["s0", "s18"], "dev": ["s19", "s21"], "test": ["s22", "s24"]}


def test_builtin_tagging_tasks_take_their_labels_from_the_data(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write(tmp_path / f"ud_ewt/any-{split}.conllu", CONLLU)
    for section in (0, 18, 19, 21, 22, 24):
        write(
            tmp_path / f"ptb/wsj/{section:02}/wsj_{section:02}01.mrg",
            f"( (S (NN s{section}) (. .)))",
        )
    ewt = read(tmp_path, task="ud_ewt")
    assert ewt.task.name == "ud_ewt"
    assert ewt.task.labels == ("PRP", "RB", "UH", "VB", "VBP")
    assert list(ewt.splits) == ["train", "dev", "test"]
    assert read(tmp_path / "ud_ewt", task="UD-EWT").splits == ewt.splits
    assert read(tmp_path, task="ud_ewt", token_column="upos").task.labels[0] == "AUX"
    ptb = read(tmp_path, task="ptb")
    assert (ptb.task.name, ptb.task.labels) == ("ptb", (".", "NN"))
    words = {split: [e.words[0] for e in part] for split, part in ptb.splits.items()}
    assert words == {"train": ["s0", "s18"], "dev": ["s19", "s21"], "test": ["s22", "s24"]}
    # one split alone: the labels come from train, or are given
    assert list(read(tmp_path, task="ud_ewt", splits=("dev",)).splits) == ["dev"]
    only = read(tmp_path / "ud_ewt/any-dev.conllu", task="ud_ewt", splits=("dev",),
                labels=ewt.task.labels)  # fmt: skip
    assert only.splits["dev"] == ewt.splits["dev"]


def test_builtin_tagging_tasks_are_of_no_other_kind_or_format(tmp_path: Path) -> None:
    write(tmp_path / "train.conllu", CONLLU)
    with pytest.raises(UsageError, match="task 'ud_ewt' is tokens, not classification"):
        read(tmp_path, task="ud_ewt", kind="classification")
    with pytest.raises(UsageError, match="conllu files are of the kind tokens"):
        read(tmp_path / "train.conllu", task="mrpc")
    with pytest.raises(DataError, match="no files such as"):
        read(tmp_path, task="ptb")


def test_the_usual_tags_are_the_treebanks_forty_five() -> None:
    assert len(builtin_task("ptb").task.labels) == 45


def test_the_real_tags_are_the_usual_ones(real_data: Callable[..., Path]) -> None:
    real_data("ud_ewt")
    data = read(real_data(), task="ud_ewt")
    assert [len(part) for part in data.splits.values()] == [12544, 2001, 2077]
    assert set(data.task.labels) <= set(BUILTIN_TASKS["ud_ewt"].task.labels)


@pytest.mark.parametrize(("column", "tags"), [("xpos", 49), ("upos", 17)], ids=["xpos", "upos"])
def test_real_conllu_is_read_whole(real_data: Callable[..., Path], column: str, tags: int) -> None:
    data = read(real_data("ud_ewt"), token_column=column, splits=("dev", "test"), labels=None)
    rows = {split: len(part) for split, part in data.splits.items()}
    assert rows == {"dev": 2001, "test": 2077}
    assert len(data.task.labels) == tags


WORD = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1)
SENTENCES = st.lists(
    st.lists(st.tuples(WORD, st.sampled_from(["NN", "VB"])), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(SENTENCES)
def test_written_sentences_come_back(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[list[tuple[str, str]]]
) -> None:
    base = tmp_path_factory.getbasetemp()
    conllu = "".join(
        "".join(f"{i}\t{w}\t_\t_\t{t}\t_\t_\t_\t_\t_\n" for i, (w, t) in enumerate(s, 1)) + "\n"
        for s in sentences
    )
    path = write(base / "t.conllu", conllu)
    assert tagged(read(path, labels=("NN", "VB"))) == sentences
    conll = "".join("".join(f"{w} {t}\n" for w, t in s) + "\n" for s in sentences)
    if "-DOCSTART-" not in conll:
        path = write(base / "t.conll", conll)
        assert tagged(read(path, labels=("NN", "VB"))) == sentences
