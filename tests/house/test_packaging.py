"""`pyproject.toml` names every room, every module at the top, and exactly the libraries that are imported."""

from __future__ import annotations

import fnmatch
import re
import sys
import tomllib
from functools import cache
from typing import Any

import pytest

from tests.house.tree import ROOMS, ROOT, files, imports, program, python_files

# import name -> distribution, where they differ
DISTRIBUTION = {
    "langchain_core": "langchain-openai",
    "langchain_openai": "langchain-openai",
    "_pytest": "pytest",
    "cuda": "cuda-bindings",
    "yaml": "pyyaml",
    "opentelemetry": "opentelemetry-sdk",
}
# used through another library or a tool, never imported by name
UNIMPORTED = {
    "mypy",
    "ruff",
    "pytest-cov",
    "pytest-timeout",
    "pytest-xdist",
    "numba-cuda",
    "opentelemetry-exporter-otlp-proto-http",
    "gradio",
}
LENT = {"torch"}  # may be imported by tests as well


@cache
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", item).group().lower().replace("_", "-") for item in requirements}  # type: ignore[union-attr]


def used_by(chosen: tuple[str, ...]) -> dict[str, str]:
    """distribution -> a file that imports it."""
    own = {*ROOMS, "server", "numbatch", "tests", "conftest"}
    used = {}
    for name in chosen:
        for line, module in imports(name):
            top = module.split(".")[0]
            if top and top not in sys.stdlib_module_names and top not in own:
                used[DISTRIBUTION.get(top, top).lower().replace("_", "-")] = f"{name}:{line}"
    return used


def test_packages_and_modules_are_listed() -> None:
    tool = project()["tool"]["setuptools"]
    include = tool["packages"]["find"]["include"]
    for room in ROOMS:
        assert any(fnmatch.fnmatch(room, pattern) for pattern in include), f"{room} is not in packages.find.include"
    for pattern in include:
        assert any(fnmatch.fnmatch(room, pattern) for room in ROOMS), f"{pattern} matches no room"
    assert set(tool["py-modules"]) == {name.removesuffix(".py") for name in files() if re.fullmatch(r"\w+\.py", name)}


def test_every_folder_of_a_room_is_a_package() -> None:
    for name in program():
        folder = name.rpartition("/")[0]
        assert not folder or f"{folder}/__init__.py" in files(), f"{folder} has no __init__.py"


def test_libraries_of_the_program_are_dependencies() -> None:
    base = names(project()["project"]["dependencies"])
    extras = project()["project"]["optional-dependencies"]
    for library, where in used_by(tuple(n for n in program() if not n.startswith("bench/"))).items():
        known = base | names(extras["cuda"]) if where.startswith("engine/cuda/") else base
        assert library in known, f"{where} imports {library}, which is not in dependencies"
    for library, where in used_by(python_files("bench")).items():
        assert library in base | names(extras["bench"]), f"{where} imports {library}, which the bench extra does not bring"
    for library, where in used_by(python_files("tests")).items():
        assert library in base | names(extras["test"]) | names(extras["bench"]), (
            f"{where} imports {library}, which the test extra does not bring"
        )


def test_dependencies_are_used() -> None:
    unused = names(project()["project"]["dependencies"]) - set(used_by(program())) - UNIMPORTED
    assert not unused, f"in dependencies, imported nowhere: {unused}"
    everywhere = set(used_by(python_files()))
    for extra, listed in project()["project"]["optional-dependencies"].items():
        unused = names(listed) - everywhere - UNIMPORTED
        assert not unused, f"in the extra {extra}, imported nowhere: {unused}"


@pytest.mark.parametrize("requirement", [*project()["project"]["dependencies"], *project()["project"]["optional-dependencies"]["test"]])
def test_every_dependency_has_a_range(requirement: str) -> None:
    assert re.search(r">=[0-9.]+,<[0-9.]+$", requirement), requirement


def test_the_ranges_the_project_depends_on() -> None:
    text = project()["project"]["dependencies"]
    assert any(item.startswith("torch>=2.11,<2.14") for item in text)
    assert any(item.startswith("numpy>=") and item.endswith("<2.5") for item in text)
