"""The tree itself: headers, lengths, names, and what must never be written into a file."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from tests.house.tree import ROOMS, ROOT, files, parsed, program, python_files

MAX_LINES = 600
MAX_HEADER = 20  # lines of a module docstring
MAX_KERNEL_HEADER = 60  # of a kernel file: what, layout drawing, work split, versions tried and their numbers

# Put together here so that this file does not hold what it looks for.
FOREIGN = {
    "a package registry's host": "|".join(
        ("pypi" r"\.org", "python" r"hosted\.org", "npm" r"js\.org", "deb" r"ian\.org", "py" r"torch\.org/whl")
    ),
    "a path of one machine": r"(?<![\w./-])/(?:wo" r"rk|tm" r"p|ro" r"ot|ho" r"me|o" r"pt)/\w",
}


@pytest.mark.parametrize("name", program())
def test_modules_say_what_they_are_for(name: str) -> None:
    tree = parsed(name)
    if not tree.body:
        return  # an empty __init__.py
    header = ast.get_docstring(tree)
    assert header, f"{name} has no module docstring"
    assert len(header) >= 30, f"{name}: the docstring says nothing"
    limit = MAX_KERNEL_HEADER if name.startswith(("engine/cpu/", "engine/cuda/")) else MAX_HEADER
    assert header.count("\n") < limit, f"{name}: the docstring is longer than {limit} lines"


@pytest.mark.parametrize("name", [name for name in program() if name.endswith("__init__.py")])
def test_packages_do_nothing_when_imported(name: str) -> None:
    assert not [node for node in parsed(name).body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]


@pytest.mark.parametrize("name", python_files())
def test_files_stay_readable(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES, f"{name} has {len(lines)} lines; a file over {MAX_LINES} is two"


def test_nothing_shadows_the_standard_library() -> None:
    tops = {name.split("/")[0].removesuffix(".py") for name in python_files()}
    assert not tops & set(sys.stdlib_module_names)


def test_the_rooms_are_the_folders() -> None:
    tops = {name.split("/")[0] for name in python_files() if "/" in name}
    assert tops - {"tests"} == set(ROOMS)


@pytest.mark.parametrize("name", files())
def test_no_host_of_a_registry_and_no_path_of_a_machine(name: str) -> None:
    try:
        text = (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # a binary fixture
    for what, pattern in FOREIGN.items():
        found = [f"{name}:{n}" for n, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]
        assert not found, f"{what}: {found}"


@pytest.mark.parametrize("name", program())
def test_nothing_is_left_to_do(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not [
        f"{name}:{node.lineno}"
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node)
    ]
