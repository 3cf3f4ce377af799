"""What the pages say exists: knobs, routes, metrics, words, commands."""

from __future__ import annotations

import ast
import re

import pytest
from aiohttp import web

import api.lifecycle
import engine.loop
from api.app import add_routes
from cli.docs import generated
from config.cli import parser
from config.load import all_knobs
from tests.house.tree import ROOT, files, parsed, program

PAGES = [name for name in files() if name.endswith(".md") and not name.startswith(("tests/", "bench/"))]


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in generated(ROOT)])
def test_generated_files_are_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == generated(ROOT)[ROOT / path], "run python -m cli.docs"


def test_every_knob_is_read_by_somebody() -> None:
    """No option is accepted and ignored: outside config/ somebody reads an attribute of that name."""
    read: set[object] = set()
    for file in program():
        if not file.startswith("config/"):
            for node in ast.walk(parsed(file)):
                read |= {node.attr} if isinstance(node, ast.Attribute) else {node.value} if isinstance(node, ast.Constant) else set()
    # all that these two mean is in config/checks.py; a knob with one allowed value is reserved for the next ones
    elsewhere = {"server.insecure", "model.model_format"}
    assert not [knob.key for knob in all_knobs() if knob.name not in read and knob.key not in elsewhere and len(knob.choices) != 1]


def routes() -> set[str]:
    """`METHOD /path` of everything the server answers."""
    router = web.UrlDispatcher()
    add_routes(router)
    found = {f"{route.method} {route.resource.canonical}" for route in router.routes() if route.resource is not None}
    return {name for name in found if not name.startswith(("HEAD ", "* "))}


def test_every_route_is_documented() -> None:
    rows = set(re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == routes()


def test_every_metric_is_documented() -> None:
    metrics = generated(ROOT)[ROOT / "docs/operating.md"]
    assert "`vllm:time_to_first_token_seconds`" in metrics
    assert "`lmdeploy:num_requests_running`" in metrics


def test_every_exit_code_is_documented() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/operating.md").read_text(encoding="utf-8"), re.MULTILINE)}
    codes = {value for module in (api.lifecycle, engine.loop) for name, value in vars(module).items() if name.startswith("EXIT_")}
    assert documented == codes


def test_every_glossary_word_of_the_engine_is_explained() -> None:
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    homes = (
        "engine/cache/",
        "engine/models/spec.py",
        *(f"engine/{n}.py" for n in ("sequence", "step", "scheduler", "loop", "executor", "batch", "backend", "parallel", "w4", "w8")),
    )
    missing = [
        f"{file}: {node.name}"
        for file in program()
        if file.startswith(homes)
        for node in parsed(file).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and f"`{node.name}`" not in page
    ]
    assert not missing


def test_every_file_of_the_engine_is_on_the_map() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    inside = [name.removeprefix("engine/") for name in program() if name.startswith("engine/") and not name.endswith("__init__.py")]
    assert not [name for name in inside if not name.startswith(("cpu/", "cuda/")) and f"`{name}`" not in page]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_pages_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    flags = {option for action in parser()._actions for option in action.option_strings}
    for target in re.findall(r"(?:^|`| {4}|\n)make ([a-z]+)\b", text):
        assert target in targets, f"{page}: make {target}"
    for module in re.findall(r"python -m ((?:api|bench|cli|config|engine|text)\.[a-z_.]*[a-z])", text):
        assert f"{module.replace('.', '/')}.py" in files(), f"{page}: python -m {module}"
    for line in re.findall(r"server\.py (--[^\n`|]*)", text):
        for flag in re.findall(r"(?<![\w-])--[a-z-]+", line):
            assert flag in flags, f"{page}: server.py {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_links_in_the_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (folder / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_pages_exist(page: str) -> None:
    if page in ("CHANGES.md",):
        return  # speaks of the past as well
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"`((?:api|bench|cli|config|docs|engine|formats|tests|text)/[\w./-]+\.(?:py|toml|md))`", text):
        assert target in files(), f"{page}: {target}"
