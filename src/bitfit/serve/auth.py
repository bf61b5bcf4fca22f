"""Who may do what: API keys with the roles ``predict`` and ``manage``.

A key is kept as its SHA-256 only, so it can stand in no log, and is compared in constant time.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from bitfit.errors import UsageError
from bitfit.serve.failures import RequestFailed
from bitfit.serve.settings import ServeConfig, is_loopback

Role = Literal["predict", "manage"]
ROLES: tuple[Role, ...] = get_args(Role)
VARIABLE = "BITFIT_API_KEYS"
SHORTEST = 16
MAX_KEYS_BYTES = 1 << 20
# At the beginning of a line or after a blank: a key may have one inside.
_COMMENT = re.compile(r"(^|\s)#.*")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    role: Role
    key: str | None
    """First 8 hex digits of the key's SHA-256, for the log; None where no keys are needed."""


class Keys:
    """The keys that a server knows. With none at all, everyone may do everything."""

    def __init__(self, keys: Mapping[bytes, Role] | None = None) -> None:
        self._keys = dict(keys or {})

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def parse(cls, text: str, source: str) -> Keys:
        """Return the keys in ``text``: ``ROLE:KEY``, between blanks, commas or on lines.

        A key may stand as ``sha256:`` and 64 hex digits in place of itself. ``#`` begins a comment.

        Raises:
            UsageError: something else; says where, never what stands there.
        """
        found: dict[bytes, Role] = {}
        for number, line in enumerate(text.splitlines(), 1):
            for entry in re.split(r"[\s,]+", _COMMENT.sub("", line).strip()):
                if entry:
                    digest, role = _parse_entry(entry, f"{source}:{number}")
                    found[digest] = role
        if not found:
            raise UsageError(f"{source}: no key in it; expected lines of ROLE:KEY")
        return cls(found)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Keys:
        """Return the keys of a file; None takes those of the variable ``BITFIT_API_KEYS``.

        Raises:
            UsageError: the file cannot be read, or holds something else.
        """
        if path is None:
            text = os.environ.get(VARIABLE, "")
            return cls.parse(text, VARIABLE) if text.strip() else cls()
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_KEYS_BYTES + 1)
            if len(data) > MAX_KEYS_BYTES:
                raise UsageError(f"{path}: more than {MAX_KEYS_BYTES} bytes: no file of keys")
            return cls.parse(data.decode(), str(path))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError:
            raise UsageError(f"{path}: is no UTF-8 text; expected lines of ROLE:KEY") from None

    def check(self, authorization: str | None, role: Role) -> Caller:
        """Return who sends the header ``Authorization: Bearer KEY``, if they may act as ``role``.

        Raises:
            RequestFailed: 401 without a known key, 403 with one of another role.
        """
        if not self._keys:
            return Caller("manage", None)
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        known: Role | None = None
        for stored, of in self._keys.items():  # all of them, whichever it is
            if hmac.compare_digest(stored, digest):
                known = of
        if known is None or scheme.lower() != "bearer":
            message = "this needs a key: send the header 'Authorization: Bearer KEY'"
            if authorization:
                message = "this key is not known here"
            raise RequestFailed(401, message, headers={"WWW-Authenticate": "Bearer"})
        if role == "manage" and known != "manage":
            raise RequestFailed(403, "this key may predict only; it needs one of the role manage")
        return Caller(known, digest.hex()[:8])


def check_bind(config: ServeConfig, keys: Keys) -> None:
    """Refuse to open a server without keys to other machines.

    Raises:
        UsageError: with what to do.
    """
    if not config.is_loopback and not len(keys) and not config.insecure:
        raise UsageError(
            f"--host {config.host} can be reached from other machines and there are no keys: give "
            f"some with --keys FILE or {VARIABLE}, or say --insecure to let everyone in"
        )


def check_browser(headers: Mapping[str, str], method: str) -> None:
    """Refuse what another web page lets a browser send to a server without keys.

    Such a server trusts its own machine, and so must not trust a page that the machine shows: the
    name it was asked under must be that of this machine, and a change must come from its own page.

    Raises:
        RequestFailed: 403.
    """
    host = headers.get("host", "")
    if not is_loopback(_host_of(f"//{host}")):
        raise RequestFailed(
            403, "without keys this server answers under localhost only", code="wrong_host"
        )
    origin = headers.get("origin")
    if origin is not None and method not in ("GET", "HEAD") and _netloc_of(origin) != host:
        raise RequestFailed(403, "sent by a page of another site", code="cross_origin")


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _netloc_of(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def _parse_entry(entry: str, where: str) -> tuple[bytes, Role]:
    role, _, key = entry.partition(":")
    if role not in ROLES or not key:
        raise UsageError(f"{where}: expected ROLE:KEY with a role of {', '.join(ROLES)}")
    if (hashed := _HASHED.fullmatch(key)) is not None:
        return bytes.fromhex(hashed[1]), _role(role)
    if not key.isascii():
        raise UsageError(f"{where}: the key is not ASCII, which alone a request's header can carry")
    if len(key) < SHORTEST:
        raise UsageError(f"{where}: the key has {len(key)} characters, expected {SHORTEST} or more")
    return sha256(key.encode()).digest(), _role(role)


def _role(name: str) -> Role:
    return next(role for role in ROLES if role == name)
