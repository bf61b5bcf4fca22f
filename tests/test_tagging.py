"""Part-of-speech tagging from files to scores: what is trained on, and what counts as right."""

from collections.abc import Callable
from pathlib import Path

import pytest

import bitfit
from bitfit.data import DataConfig, read_dataset
from bitfit.encoder import Encoder
from bitfit.heads import read_predictions
from bitfit.metrics import CUT_OFF
from bitfit.tasks import TokenExample

SENTENCES = (
    "(DT the) (NN bike) (VBD was) (JJ late)",
    "(PRP we) (VBP very) (JJ good) (NN film)",
    "(NN money) (VBD was) (RB back) (IN at) (DT a) (NN bike)",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Wall Street Journal's 25 sections, one file of three sentences each."""
    folder = tmp_path_factory.mktemp("data")
    for section in range(25):
        path = folder / "ptb" / "wsj" / f"{section:02}" / f"wsj_{section:02}01.mrg"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"( (S {sentence}) )\n" for sentence in SENTENCES))
    return folder


def test_the_treebank_is_trained_by_name_on_its_sections(
    data: Path, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "pos.bitfit.safetensors"
    outcome = bitfit.finetune(
        checkpoint(), data=data, task="ptb", out=out, epochs=2, learning_rate=2e-2, dtype="fp32",
        max_length=16,
    )  # fmt: skip
    rows = {split: len(examples) for split, examples in outcome.dataset.splits.items()}
    assert rows == {"train": 19 * 3, "dev": 3 * 3}
    assert outcome.file.task.metrics == ("accuracy",)
    assert outcome.score > 0.9
    file = bitfit.TaskFile.load(out)
    assert (file.task.name, file.task.labels) == (
        "ptb", ("DT", "IN", "JJ", "NN", "PRP", "RB", "VBD", "VBP"),
    )  # fmt: skip
    assert file.builtin is bitfit.tasks.BUILTIN_TASKS["ptb"]
    test = read_dataset(
        DataConfig(data=data, task="ptb", labels=file.task.labels, splits=("test",))
    ).splits["test"]
    assert bitfit.load(out, checkpoint()).evaluate(test)["accuracy"] == outcome.score


@pytest.mark.parametrize(("max_length", "kept"), [(16, 6), (6, 4), (4, 2)])
def test_accuracy_is_over_words_and_a_word_cut_off_is_wrong(
    data: Path, open_tiny: Callable[..., Encoder], max_length: int, kept: int
) -> None:
    encoder = open_tiny()
    outcome = bitfit.finetune(
        encoder, data=data, task="ptb", epochs=1, learning_rate=2e-2, dtype="fp32",
        max_length=max_length,
    )  # fmt: skip
    model = bitfit.Model(encoder)
    model.add(outcome.file)
    dev = [e for e in outcome.dataset.splits["dev"] if isinstance(e, TokenExample)]
    features, logits = model.logits(dev, ["ptb"] * len(dev))
    answers = read_predictions(outcome.file.task, dev, features, logits)
    right = words = 0
    for example, answer in zip(dev, answers, strict=True):
        assert example.labels is not None
        assert len(answer) == len(example.words)
        assert all(tag == CUT_OFF for tag in answer[kept:])
        right += sum(a == b for a, b in zip(answer, example.labels, strict=True))
        words += len(example.words)
    assert words == 3 * (4 + 4 + 6)
    assert outcome.score == pytest.approx(right / words)
    assert right <= 3 * sum(min(n, kept) for n in (4, 4, 6))


def test_a_treebank_of_other_tags_is_trained_by_name_and_evaluated_from_its_file(
    checkpoint: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitfit import cli

    line = "{}\t{}\t_\tX\t{}\t_\t_\t_\t_\t_\n"
    for split in ("train", "dev", "test"):
        words = [("bike", "A"), ("late", "B"), ("money", "C" if split == "train" else "A")]
        text = "".join(line.format(i, *word) for i, word in enumerate(words, 1)) + "\n"
        path = tmp_path / "ud_ewt" / f"en_ewt-ud-{split}.conllu"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text * 6)
    out, base = tmp_path / "mine.bitfit.safetensors", checkpoint()
    train = ["train", "--base", base, "--task", "ud_ewt", "--name", "mine", "--data", tmp_path,
             "--out", out, "--epochs", 1, "--quiet"]  # fmt: skip
    assert cli.main([str(a) for a in train]) == 0
    assert bitfit.TaskFile.load(out).task.labels == ("A", "B", "C")
    for split in ("dev", "test"):
        capsys.readouterr()
        evaluate = ["eval", out, "--data", tmp_path, "--split", split, "--base", base]
        assert cli.main([str(a) for a in evaluate]) == 0
        assert f"6 rows of {split}" in capsys.readouterr().out
