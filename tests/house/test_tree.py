"""The tree itself: headers, lengths, names, and what must never be written into a file."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from tests.house.tree import ROOMS, ROOT, files, parsed, program, python_files

MAX_LINES = 600
MAX_TEST_LINES = 800  # tests are lists: they are looked up, not read through
MAX_HEADER = 20  # lines of a module docstring
MAX_KERNEL_HEADER = 60  # of a kernel file: what, layout drawing, work split, versions tried and their numbers

# Put together here so that this file does not hold what it looks for.
FOREIGN = {
    "a package registry's host": "|".join(
        ("pypi" r"\.org", "python" r"hosted\.org", "npm" r"js\.org", "deb" r"ian\.org", "py" r"torch\.org/whl")
    ),
    "a path of one machine": r"(?<![\w./-])/(?:wo" r"rk|tm" r"p|ro" r"ot|ho" r"me|o" r"pt)/\w",
}


def test_modules_say_what_they_are_for() -> None:
    wrong = []
    for name in program():
        tree = parsed(name)
        if not tree.body:
            continue  # an empty __init__.py
        header = ast.get_docstring(tree) or ""
        limit = MAX_KERNEL_HEADER if name.startswith(("engine/cpu/", "engine/cuda/")) else MAX_HEADER
        if not 30 <= len(header) or header.count("\n") >= limit:
            wrong.append(
                f"{name}: a docstring of {len(header)} characters on {header.count(chr(10)) + 1} lines; 30 and {limit} are the bounds"
            )
    assert not wrong


def test_packages_do_nothing_when_imported() -> None:
    packages = [name for name in program() if name.endswith("__init__.py")]
    assert not [name for name in packages for node in parsed(name).body if not isinstance(node, ast.Expr)]


def test_files_stay_readable() -> None:
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in python_files()}
    too_long = {name: lines for name, lines in lengths.items() if lines > (MAX_TEST_LINES if name.startswith("tests/") else MAX_LINES)}
    assert not too_long, f"a file over {MAX_LINES} lines is two"


def test_nothing_shadows_the_standard_library() -> None:
    tops = {name.split("/")[0].removesuffix(".py") for name in python_files()}
    assert not tops & set(sys.stdlib_module_names)


def test_the_rooms_are_the_folders() -> None:
    tops = {name.split("/")[0] for name in python_files() if "/" in name}
    assert tops - {"tests", "examples"} == set(ROOMS)


@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_foreign_is_written_down(what: str) -> None:
    found = []
    for name in files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a binary fixture
        found += [f"{name}:{n}" for n, line in enumerate(text.splitlines(), 1) if re.search(FOREIGN[what], line)]
    assert not found, what


def test_nothing_is_left_to_do() -> None:
    for name in program():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.findall(r"\b(TODO|FIXME|XXX|HACK)\b", text), name
        assert not [
            node.lineno for node in ast.walk(parsed(name)) if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node)
        ], name
