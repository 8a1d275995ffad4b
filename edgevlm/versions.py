"""Versions of what computes: what is kept between processes belongs to them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

#: Packages whose module has another name.
_MODULES = {"llama-cpp-python": "llama_cpp", "pillow": "PIL"}


def versions(*packages: str) -> dict[str, str]:
    """The version of each package, and of edgevlm, without importing them.

    A program that was frozen into one file has no metadata: there the size and age of a package's first file stand for
    it, so that another one is never taken for it; `missing` if there is no such package.
    """
    from edgevlm import __version__

    return {"edgevlm": __version__, **{package: _version(package) for package in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(_MODULES.get(package, package))
        if spec is None or spec.origin is None:
            return "missing"
        try:
            found = Path(spec.origin).stat()
        except OSError:
            return "unknown"
        return f"unknown, {found.st_size} bytes, {found.st_mtime_ns}"
