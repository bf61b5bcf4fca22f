"""Fixtures that several test files share."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

# One thread: on tiny models two threads only wait for each other, the more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it when it is first imported: without a GPU kernels are run by its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from bitfit.encoder import Encoder

# No example has a time in which it must be done: a busy machine stops any of them for longer.
settings.register_profile("tests", settings(), deadline=None)
settings.load_profile("tests")

# Where bitfit is imported from, if by PYTHONPATH.
SOURCE_PATH = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


@pytest.fixture(scope="session")
def real_data() -> Callable[..., Path]:
    """A function from the parts of a path below the real data to that path; skips where absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("BITFIT_DATA", default))

    def find(*parts: str) -> Path:
        path = root.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"no real data at {path}; set BITFIT_DATA to run this")
        return path

    return find


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function from a family (and a seed) to the directory of its tiny random checkpoint."""
    from tiny import make_checkpoint

    folder = tmp_path_factory.mktemp("bases")

    @functools.cache
    def make(family: str = "bert", seed: int = 0) -> str:
        return make_checkpoint(folder, family, seed)

    return make


@pytest.fixture(scope="session")
def processes() -> Any:
    """Processes forked from one that has imported torch and what the tests run in them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing", "several", "sweeping"])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11's fork server looks for what it preloads on PYTHONPATH only.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *SOURCE_PATH]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def open_tiny(checkpoint: Callable[..., str]) -> Callable[..., Encoder]:
    """A function from a family to a fresh encoder of its tiny random base."""
    from bitfit.base import load_base
    from bitfit.encoder import Encoder

    def open_it(family: str = "bert", seed: int = 0, **options: Any) -> Encoder:
        return Encoder(load_base(checkpoint(family, seed)), **options)

    return open_it


@pytest.fixture
def log_lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """A function to the lines that a server logged."""
    from bitfit.serve import logs

    stream, logger = io.StringIO(), logs.LOGGER
    before = logger.handlers[:], logger.propagate, logger.level
    logs.configure(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """A small CSV of the tiny vocabulary's words whose label can be learned."""
    random = np.random.default_rng(0)
    lines = ["body,intent"]
    for i in range(60):
        word = ("good nice fast", "bad broken late")[i % 2].split()[random.integers(3)]
        rest = random.choice("the a film bike order is was very we it this that".split(), 4)
        lines.append(f"{' '.join([*rest[:2], word, *rest[2:]])},{('praise', 'complaint')[i % 2]}")
    path = tmp_path / "tickets.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
