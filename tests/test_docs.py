"""What the pages say is so: links, commands, options, code, names, numbers."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import bitfit
from bitfit.errors import BitfitError
from bitfit.training.settings import RECIPES, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
COMMAND_LINE = ROOT / "docs" / "command-line.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page):
    return page.read_text(encoding="utf-8")


def python_blocks(page):
    return [code for language, code in FENCE.findall(text_of(page)) if language == "python"]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks_are_python(page):
    for code in python_blocks(page):
        ast.parse(code)


# ------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def commands():
    """The commands of the command line by name, those of a group as ``bench train``."""
    import typer

    from bitfit.cli.app import app

    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {"": command})
        found |= {f"{name} {each}".strip(): inner[each] for each in inner}
    return found


def command_of(words, commands):
    """The name of the command that a line calls, and its arguments."""
    name = " ".join(words[:2])
    return (name, words[2:]) if name in commands else (words[0], words[1:])


def options_of(command):
    names = (o for p in command.params for o in [*p.opts, *p.secondary_opts])
    return {name for name in names if name.startswith("-")} | {"--help"}


def command_lines(page):
    """The arguments of every ``bitfit ...`` line in a page's blocks."""
    text = text_of(page).replace("\\\n", " ")
    blocks = [code for language, code in FENCE.findall(text) if language != "python"]
    blocks += re.findall(r"^(?: {4}.*\n?)+", FENCE.sub("", text), re.MULTILINE)
    for line in "\n".join(blocks).splitlines():
        line = re.sub(r"^\s*(torchrun|accelerate launch) .*?-m (-- )?(?=bitfit )", "", line)
        if line.strip().startswith("bitfit "):
            words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if word in ("|", ">", "<", "&&")), None)
            yield words[1:end]


def inline_commands(page):
    """Commands in running text, which may leave out what is required."""
    text = re.sub(r"^(?: {4}.*\n?)+", "", FENCE.sub("", text_of(page)), flags=re.MULTILINE)
    for span in re.findall(r"`(bitfit [^`]+)`", text):
        yield span.split()[1:]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_line_parses(page, commands):
    for words in command_lines(page):
        name, arguments = command_of(words, commands)
        assert name in commands, words
        commands[name].make_context(f"bitfit {name}", arguments)  # raises on any misuse


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_in_running_text_exist(page, commands):
    for words in inline_commands(page):
        if words[0] == "COMMAND" or words[0].startswith("-"):
            continue
        name, arguments = command_of(words, commands)
        assert name in commands, words
        for word in arguments:
            assert not word.startswith("-") or word in options_of(commands[name]), words


def test_the_pages_show_commands_at_all():
    assert len([words for page in PAGES for words in command_lines(page)]) > 30


def sections():
    """The text of docs/command-line.md by command."""
    parts = re.split(r"^## (\w[\w ]*)$", text_of(COMMAND_LINE), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_documented_with_every_option(commands):
    found = sections()
    assert list(found) == list(commands)
    for name, command in commands.items():
        for option in options_of(command) - {"--help"}:
            assert f"`{option}`" in found[name], f"bitfit {name} {option}"


def test_no_option_is_documented_that_does_not_exist(commands):
    everywhere = set().union(*map(options_of, commands.values())) | {"--version"}
    for name, text in sections().items():
        rows = [line for line in text.splitlines() if line.startswith("|")]
        for row in rows:
            for option in re.findall(r"`(--?[a-z][\w-]*)`", row.split("|")[1]):
                assert option in options_of(commands[name]), f"bitfit {name} {option}"
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][\w-]*)[ `]", text_of(page)):
            assert option in everywhere, f"{page.name}: {option}"


# ------------------------------------------------------------------ the library


def test_every_public_name_is_documented():
    text = text_of(ROOT / "docs" / "library.md")
    for name in bitfit.__all__:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/library.md", "docs/quickstart.md", "docs/data.md", "docs/recipes.md"],
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, checkpoint, tickets, monkeypatch, capsys):
    monkeypatch.chdir(tickets.parent)
    base = checkpoint("bert")
    names = {"__name__": "page"}
    if page == "README.md":  # its second task is one that the reader is supposed to have
        bitfit.finetune(
            base, data="tickets.csv", text="body", label="intent", name="mood", epochs=1,
            out="mood.bitfit.safetensors",
        )  # fmt: skip
    load = bitfit.load
    # A folder is known by its last part only: the pages' "minilm" needs no such help.
    monkeypatch.setattr(bitfit, "load", lambda files, base=base: load(files, base=base))
    for code in python_blocks(ROOT / page):
        exec(compile(code.replace('"minilm"', repr(base)), page, "exec"), names)
    assert capsys.readouterr().out


def test_errors_are_listed_on_the_page_of_the_library():
    text = text_of(ROOT / "docs" / "library.md")

    def below(kind):
        for child in kind.__subclasses__():
            if child.__module__ == "bitfit.errors":
                yield child.__name__
                yield from below(child)

    assert all(f"`{name}`" in text for name in below(BitfitError))


# ------------------------------------------------------------------ numbers and names


def test_the_table_of_recipes_is_that_of_the_code():
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| (?:`[^`]+`)? ?\|",
        text_of(ROOT / "docs" / "recipes.md"),
        re.MULTILINE,
    )
    written = {name: (default.strip(), paper.strip()) for name, default, paper in rows}

    def shown(recipe, name):
        config = TrainConfig(recipe=recipe, **RECIPES[recipe])
        return str(getattr(config, name)).lower()

    fields = {f.name for f in dataclasses.fields(TrainConfig)} - {"recipe", "method"}
    assert written == {name: (shown("default", name), shown("paper", name)) for name in fields}


def test_the_architecture_names_every_module_and_only_tests_that_exist():
    text = text_of(ROOT / "ARCHITECTURE.md")
    source = Path(bitfit.__file__).parent
    for path in source.iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            assert re.search(rf"\b{path.stem}\b", text), path.name
        elif (path / "__init__.py").exists():
            assert f"{path.name}/" in text, path.name
    tests = "".join(text_of(path) for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def test_the_layers_of_the_architecture_are_those_that_are_held():
    from test_package import LAYERS

    lines = re.findall(r"^\d+\. (`.+)$", text_of(ROOT / "ARCHITECTURE.md"), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", line)) for line in lines] == [set(x) for x in LAYERS]


def test_the_changelog_has_the_version():
    text = text_of(ROOT / "CHANGELOG.md")
    assert f"## [{bitfit.__version__}]" in text
    assert text.index("## [Unreleased]") < text.index(f"## [{bitfit.__version__}]")
