"""Every choice of a server: where it listens, how it batches, and what it refuses."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, replace

from bitfit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a server behaves; each limit is checked before memory is spent on what exceeds it.

    Raises:
        UsageError: a value that cannot be meant; names it and what was expected.
    """

    host: str = "127.0.0.1"
    """Address to listen on. Another than this machine's own needs keys, or ``insecure``."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    insecure: bool = False
    """Listen beyond this machine without keys: everyone who reaches it may change tasks."""
    tasks: str | None = None
    """Folder (or fsspec URL) of the task files; uploads are kept in a folder, not in a URL."""
    watch_seconds: float = 5.0
    """How often ``tasks`` is looked at; 0: at the start only."""
    max_tokens: int = 2048
    """Padded tokens in one batch: the number of items times the longest."""
    max_wait_ms: float = 2.0
    """How long an item waits for others when the engine is idle and the batch is not full."""
    max_queue_items: int = 4096
    """Items accepted and not yet answered; more are refused with 429."""
    max_queue_tokens: int = 262_144
    """Tokens that wait; more are refused with 429."""
    max_delay_ms: float = 30_000.0
    """A request that would wait longer, at the speed measured so far, is refused with 429."""
    deadline_ms: float = 60_000.0
    """How long an answer may take where a request does not say; also the longest it may say."""
    max_items: int = 1024
    """Items in one request."""
    max_text_chars: int = 100_000
    """Characters of one text."""
    max_item_tokens: int = 65_536
    """Tokens of one item, all windows of a long context together."""
    max_scores: int = 262_144
    """Scores in one answer, of all items together: their labels, or ``top_k`` where it is given."""
    max_body_bytes: int = 8 << 20
    """Bytes of a request to predict."""
    max_upload_bytes: int = 64 << 20
    """Bytes of an uploaded task file."""
    max_held_bytes: int = 256 << 20
    """Bytes of all request bodies held at one time; more are refused with 503."""
    max_requests: int = 2048
    """HTTP requests open at one time; more are refused with 503."""
    body_seconds: float = 30.0
    """How long a client may take to send its body, and to read its answer."""
    drain_seconds: float = 30.0
    """How long a server that was told to stop takes for what it has accepted; 0: not at all."""
    task_labels: int = 100
    """Tasks with a metric of their own; all others are counted together."""
    log_texts: bool = False
    """Write the texts of requests into the log."""

    def __post_init__(self) -> None:
        _check_whole(self, "port", 0, 65_535)
        for name in (
            "max_tokens", "max_queue_items", "max_queue_tokens", "max_items", "max_text_chars",
            "max_item_tokens", "max_scores", "max_body_bytes", "max_upload_bytes",
            "max_held_bytes", "max_requests",
        ):  # fmt: skip
            _check_whole(self, name, 1, 1 << 40)
        _check_whole(self, "task_labels", 0, 10_000)
        for name in ("watch_seconds", "max_wait_ms", "drain_seconds"):
            _check_number(self, name, above=False)
        for name in ("max_delay_ms", "deadline_ms", "body_seconds"):
            _check_number(self, name, above=True)
        if self.max_items > self.max_queue_items:
            raise UsageError(
                f"max_items is {self.max_items}, but the queue (max_queue_items) holds "
                f"{self.max_queue_items}: such a request could never be accepted"
            )
        for name in ("max_body_bytes", "max_upload_bytes"):
            if getattr(self, name) > self.max_held_bytes:
                raise UsageError(
                    f"{name} is {getattr(self, name)}, but all requests together (max_held_bytes) "
                    f"may have {self.max_held_bytes}: such a request could never be accepted"
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def at(self, port: int) -> ServeConfig:
        """Return the same settings with the port that was taken."""
        return replace(self, port=port)

    @property
    def address(self) -> str:
        """The server's address as a browser on this machine takes it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is an address, or the name, of this machine for itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_whole(config: ServeConfig, name: str, low: int, high: int) -> None:
    value = getattr(config, name)
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; expected a whole number from {low} to {high}")


def _check_number(config: ServeConfig, name: str, *, above: bool) -> None:
    value = getattr(config, name)
    good = isinstance(value, int | float) and math.isfinite(value)
    if not good or value < 0 or (above and value == 0):
        raise UsageError(
            f"{name} is {value!r}; expected a number {'above 0' if above else 'from 0 up'}"
        )
