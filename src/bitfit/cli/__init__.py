"""The command line: thin over the library, quick to answer ``--help``.

Nothing here imports torch or transformers before a command needs them. Results go to standard
output, everything else to standard error.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 failed, 2 misused, 130 interrupted.

    141 where the reader of standard output went away.
    """
    from bitfit.cli.app import run

    return run(argv)
