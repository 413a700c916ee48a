# SPDX-License-Identifier: Apache-2.0
"""The project's own habits, checked: sizes, names, headers, printed words, files named in the docs."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


PYTHON = tracked("*.py")
PACKAGE = [p for p in PYTHON if p.is_relative_to(ROOT / "fxslim")]
NATIVE = tracked("*.cpp", "*.cu", "*.h", "*.cuh")
MARKDOWN = tracked("*.md")
each = {"ids": lambda p: str(p.relative_to(ROOT))}


@pytest.mark.parametrize("path", PYTHON, **each)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 50, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.parent.name == "kernels"], **each)
def test_one_operator_is_one_short_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 150
    assert path.read_text().count("torch.library.define(") <= 2


@pytest.mark.parametrize("path", PYTHON + NATIVE, **each)
def test_names_say_something(path: Path) -> None:
    assert path.stem not in ("utils", "helpers", "common", "misc", "util", "helper")


@pytest.mark.parametrize("path", [p for p in PYTHON if p.read_text()], **each)
def test_header_and_docstring(path: Path) -> None:
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"


def public_functions(path: Path) -> list[ast.FunctionDef]:
    return [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
    ]


def test_no_public_function_has_the_name_of_a_module() -> None:
    modules = {p.stem for p in PACKAGE} | {p.parent.name for p in PACKAGE}
    for path in PACKAGE:
        for function in public_functions(path):
            allowed = function.name == path.stem == "main"
            assert allowed or function.name not in modules, f"{path}: {function.name}"


def test_the_public_api_is_explicit_and_on_one_screen() -> None:
    lines = (ROOT / "fxslim/__init__.py").read_text().splitlines()
    assert len(lines) <= 60
    for line in lines:
        if line.startswith(("from", "import")):
            assert re.fullmatch(r"from [\w.]+ import (\w+) as \1", line), line


@pytest.mark.parametrize("path", PACKAGE, **each)
def test_public_docstrings(path: Path) -> None:
    if path.parts[-2:] == ("kernels", "arguments.py"):
        return
    for function in public_functions(path):
        assert ast.get_docstring(function), f"{function.name} has no docstring"


@pytest.mark.parametrize("path", PYTHON + NATIVE + MARKDOWN, **each)
def test_no_unowned_promises(path: Path) -> None:
    if path == Path(__file__):
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))", line), f"line {number}: {line}"


@pytest.mark.parametrize("path", MARKDOWN, **each)
def test_files_named_in_the_docs_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for name in re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|cfg|toml|cpp|cu|h|cuh))`", text):
        found = any((base / name).exists() for base in (ROOT, path.parent, ROOT / "fxslim", ROOT / "fxslim_ext/csrc"))
        assert found, f"`{name}` does not exist"
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"link to {target}"


def test_contributing_is_one_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_native_sources_use_stable_headers_only() -> None:
    for path in NATIVE:
        for header in re.findall(r"#include <((?:torch|ATen|c10)[^>]*)>", path.read_text()):
            stable = header.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/"))
            assert stable, f"{path.name}: {header}"


def test_every_native_operator_is_defined_in_python_and_tested() -> None:
    defined = set()
    for path in PACKAGE:
        defined |= set(re.findall(r'torch\.library\.define\(\s*"fxslim::(\w+)"', path.read_text()))
    for device in ("cpu", "cuda"):
        implemented = set()
        for path in (ROOT / "fxslim_ext/csrc" / device).iterdir():
            implemented |= set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
        # Bytes are what a CPU gains by, and ranges are searched there, of any device's histogram.
        cpu_alone = {"block_sparse_conv2d_int8", "quantization_errors"}
        assert implemented == defined - (cpu_alone if device == "cuda" else set()), device
