"""The groups that this process holds: it says that it lives, and lets go of what it leaves."""

from __future__ import annotations

import threading
from types import TracebackType

from bitfit.experiments.execute import Group
from bitfit.experiments.store import HEARTBEAT_SECONDS, Store


class Held:
    """Claimed groups, between their claim and their release.

    Within ``with`` a thread beats for all of them; at its end, whatever ended it, those whose
    results were not written are let go, to be gone on with by whoever comes.

    Args:
        store: where they were claimed.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        # Replaced and never changed: the thread reads it at any time.
        self.groups: frozenset[str] = frozenset()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def add(self, group: Group) -> None:
        """Take care of a group that was claimed."""
        self.groups |= {group.id}

    def release(self, group: Group) -> None:
        """Remove the claim of a group whose results are written."""
        self.groups -= {group.id}
        self.store.end(group.id)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            for group in self.groups:
                self.store.beat(group)

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        for group in self.groups:
            self.store.let_go(group)
