"""What is kept belongs to the versions of what made it, also where packages carry no metadata."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

import edgevlm
from edgevlm.versions import versions


def test_versions_are_those_of_the_metadata() -> None:
    wanted = {name: importlib.metadata.version(name) for name in ("edgevlm", "llama-cpp-python", "pillow")}
    assert versions("llama-cpp-python", "pillow") == wanted
    assert wanted["edgevlm"] == edgevlm.__version__


def test_a_package_without_metadata_is_known_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that was frozen into one file, or packages that were copied (tests/arm64)."""
    (tmp_path / "no_metadata.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = versions("no_metadata")["no_metadata"]
    assert first.startswith("unknown, 6 bytes")
    assert versions("no_metadata")["no_metadata"] == first
    os.utime(tmp_path / "no_metadata.py", (1, 1))
    assert versions("no_metadata")["no_metadata"] != first
    assert versions("not_there_at_all")["not_there_at_all"] == "missing"
