"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_transcript_is_what_the_demo_prints() -> None:
    match = re.search(r"```console\n(.*?)```", README, re.DOTALL)
    assert match is not None
    edgevlm = Path(sysconfig.get_path("scripts")) / "edgevlm"
    command = ["sh", "examples/demo.sh", str(edgevlm)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert match[1] == shown.stdout
    assert shown.stderr == ""


def test_the_python_example_runs() -> None:
    match = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    python = Path(sysconfig.get_path("scripts")) / "python"
    shown = subprocess.run([python, "-c", match[1]], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert "56 stop" in shown.stdout


def test_links_and_the_tree_name_what_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = README[README.index("edgevlm/            the runtime") :]
    for line in tree[: tree.index("```")].splitlines():
        folder = "" if not line.startswith("  ") else "edgevlm"
        for name in re.findall(r"[a-z_]+(?:\.py|/)", line[:22]):
            assert (ROOT / folder / name).exists(), name
