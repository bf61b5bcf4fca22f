"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import suppress


def trim() -> None:
    """Give back what was freed, where the system's allocator can be told to (glibc).

    It keeps freed memory by itself. Batches are of ever other sizes, so what it keeps fits the next
    one badly and grows for hours. This takes some 10 ms, and other threads go on.
    """
    _trimmer()(0)


@functools.cache
def _trimmer() -> Callable[[int], object]:
    with suppress(OSError, AttributeError):
        found: Callable[[int], object] = ctypes.CDLL("libc.so.6").malloc_trim
        return found
    return lambda pad: None
