"""The page's files, read once from the package; no path is ever made of what a client sends."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

# Not from the system's table of types, which differs from machine to machine.
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "woff2": "font/woff2",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    data: bytes
    content_type: str
    tag: str
    """Changes with the content: an ETag."""


def read_assets() -> Mapping[str, Asset]:
    """Return the files of the package's folder ``serve/page`` by name; types it serves only."""
    folder = importlib.resources.files("bitfit").joinpath("serve", "page")
    found = {}
    for entry in folder.iterdir():
        content_type = _TYPES.get(entry.name.rpartition(".")[2])
        if entry.is_file() and content_type is not None:
            data = entry.read_bytes()
            found[entry.name] = Asset(data, content_type, f'"{sha256(data).hexdigest()[:16]}"')
    return found
