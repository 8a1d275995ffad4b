"""The house rules that can be checked by reading the code."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

import edgevlm
from edgevlm import errors

ROOT = Path(__file__).parent.parent
PACKAGES = {"edgevlm": ROOT / "edgevlm", "edgevlm.converters": ROOT / "converters"}
HEAVY = {"PIL", "onnxruntime", "llama_cpp", "gguf", "onnx_ir", "onnx", "jinja2", "typer", "rich"}
#: Besides its one home, Pillow is imported where it is timed.
TIMED = {"PIL": {"edgevlm.image", "edgevlm.bench"}}
REFERENCES = {"torch", "transformers", "tokenizers", "safetensors"}

#: Who may import whom inside edgevlm: one direction, from the front ends down to the contracts.
BASE = {
    "answer", "automaton", "cgroup", "errors", "files", "grammar", "keywords", "machine", "options", "progress",
    "scalars", "schema", "spec", "text", "threads", "tools", "versions",
}  # fmt: skip
STAGES = {
    "_arrays", "_kernels", "blob", "budget", "bundle", "choose", "constraint", "decoder", "describe", "encoder",
    "ending", "footprint", "frames", "generate", "gguf", "gguf_llama", "held", "image", "journal", "kept", "kernels",
    "layout", "llama", "lookup", "memory", "messages", "native", "preprocess", "prompt", "reading", "sampling",
    "splice", "state_folder", "storage", "stream", "template", "tiling", "tuning", "vision", "vocabulary",
}  # fmt: skip
CONVERTERS_MAY = {
    "errors", "files", "spec", "bundle", "storage", "llama", "encoder", "decoder", "families", "gguf", "journal",
    "image", "messages", "preprocess", "prompt",
}  # fmt: skip


def sources() -> dict[str, ast.Module]:
    """Module name -> syntax tree, of everything that is installed."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, *, top_level_only: bool = False) -> set[str]:
    """Full names of imported modules, without those for type checkers only."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not top_level_only or not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found |= imports(node, top_level_only=top_level_only)
    return found


def needed(tree: ast.AST) -> set[str]:
    """Packages asked for through `errors.need("package", extra)`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return {
        str(call.args[0].value).partition(".")[0]
        for call in calls
        if call.func.id == "need" and call.args and isinstance(call.args[0], ast.Constant)  # type: ignore[attr-defined]
    }


def test_each_heavy_package_is_imported_in_one_file() -> None:
    where = defaultdict(set)
    for name, tree in sources().items():
        for module in imports(tree) | needed(tree):
            # the commands are one front end in several files
            where[module.partition(".")[0]].add("edgevlm.cli" if name.startswith("edgevlm.cli.") else name)
    assert {package: files for package, files in where.items() if package in HEAVY and len(files) > 1} == TIMED
    assert where["llama_cpp"] == {"edgevlm.llama"}
    assert where["onnxruntime"] == {"edgevlm.encoder"}


def test_nothing_installed_imports_the_reference_implementations() -> None:
    for name, tree in sources().items():
        assert not {module.partition(".")[0] for module in imports(tree)} & REFERENCES, name


def test_imports_go_one_way() -> None:
    for name, tree in sources().items():
        if name == "edgevlm":
            continue
        targets = {
            module.split(".")[1] for module in imports(tree) if module.startswith("edgevlm.") and module != name
        } - {"__version__"}
        area = name.split(".")[1]
        if area in BASE or area == "families":
            assert targets <= BASE | {"families"}, name
        elif area in STAGES | {"bench"}:
            assert targets <= BASE | STAGES, name
        elif area == "converters":
            assert targets <= CONVERTERS_MAY | {"converters", "machine"}, name
        elif area in ("loading", "pipeline", "chat"):
            assert not targets & {"converters", "families", "cli"}, name


def test_importing_edgevlm_loads_nothing_heavy() -> None:
    code = "import sys, edgevlm; print({'numpy', 'PIL', 'onnxruntime', 'llama_cpp', 'typer'} & set(sys.modules) or '')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == ""


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    doc = node.body[0] if ast.get_docstring(node) else None
    return (node.end_lineno or 0) - node.lineno + 1 - ((doc.end_lineno or 0) - doc.lineno + 1 if doc else 0)


def test_size_of_files_and_functions() -> None:
    for name, tree in sources().items():
        assert tree.body[-1].end_lineno <= 400, name  # type: ignore[operator]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                # these are mostly their options, a few lines each
                limit = (
                    90 if (name, node.name) in {("edgevlm.cli.ask", "ask"), ("edgevlm.cli.convert", "convert")} else 60
                )
                assert code_lines(node) <= limit, f"{name}.{node.name} has {code_lines(node)} lines"
    for path in (ROOT / "kernels").glob("*.[ch]"):
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_every_raised_code_is_registered_and_every_registered_code_is_raised() -> None:
    text = "\n".join(path.read_text() for folder in PACKAGES.values() for path in folder.rglob("*.py"))
    registered = (ROOT / "edgevlm" / "errors.py").read_text()
    used = set(re.findall(r'"((?:' + "|".join({c.split(".")[0] for c in errors.CODES}) + r')\.[a-z_]+)"', text))
    codes_only = set(re.findall(r'^    "([a-z_.]+)":', registered, re.MULTILINE))
    assert codes_only == set(errors.CODES)
    raised = re.sub(r"CODES: dict.*?^}", "", text, flags=re.DOTALL | re.MULTILINE)
    never = {code for code in errors.CODES if f'"{code}"' not in raised}
    assert never == set()
    assert used - {"bundle.json"} <= set(errors.CODES)


def test_errors_survive_the_way_between_processes() -> None:
    samples = [cls("words", code="file.not_found") for cls in (errors.FileError, errors.BundleError, errors.ImageError)]
    samples += [errors.UsageError("words"), errors.ContextError("words", needed=3, available=2)]
    for error in samples:
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    assert drawn == {cls.__name__ for cls in errors.EdgeVLMError.__subclasses__()}


def test_public_names() -> None:
    for name in edgevlm.__all__:
        assert getattr(edgevlm, name) is not None
    assert set(edgevlm.__all__) <= set(dir(edgevlm))
    with pytest.raises(AttributeError):
        _ = edgevlm.nothing


def test_versions_agree_and_the_constraints_name_no_host() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == edgevlm.__version__
    constraints = (ROOT / "constraints.txt").read_text()
    assert "://" not in constraints
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in constraints.splitlines() if "==" in line}
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=\[]", entry)[0]).lower() for entry in wanted} - {"edgevlm"}
    assert names <= pinned
    documented = (ROOT / "docs" / "dependencies.md").read_text().lower()
    rivals = [line for line in (ROOT / "bench-requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    for name in names | {line.split("==")[0] for line in rivals}:
        assert f"`{name}`" in documented, f"docs/dependencies.md gives no reason for {name}"
