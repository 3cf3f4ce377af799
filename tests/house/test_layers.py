"""Who may import whom. The table is architecture's; a line here fails before a habit forms."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.tree import ROOMS, ROOT, imports, module_name, program, python_files

MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "formats": {"config"},
    "text": {"config", "formats"},
    "engine": {"config", "formats"},
    "api": {"config", "formats", "text", "engine"},
    "bench": {"config", "formats", "text", "engine", "api"},
    "server": {"config", "formats", "text", "engine", "api"},
    "cli": {"config", "formats", "text", "engine", "api", "bench", "server"},
}
PURE_WING = ("sequence", "step", "errors", "scheduler", "cache")  # of engine/
NOT_PURE = ("engine.cache.store",)  # the tensors


def is_pure(module: str) -> bool:
    return module.split(".")[1:2] != [] and module.split(".")[1] in PURE_WING and module not in NOT_PURE


def test_every_room_is_in_the_table() -> None:
    assert set(MAY_IMPORT) == {*ROOMS, "server"}


@pytest.mark.parametrize("name", program())
def test_rooms_import_downwards_only(name: str) -> None:
    room = module_name(name).split(".")[0]
    wrong = [
        f"{name}:{line} imports {module}"
        for line, module in imports(name)
        if module.split(".")[0] in MAY_IMPORT and module.split(".")[0] not in MAY_IMPORT[room] | {room}
    ]
    assert not wrong


@pytest.mark.parametrize("name", program())
def test_imports_are_absolute(name: str) -> None:
    assert not [f"{name}:{line}" for line, module in imports(name) if module.startswith(".")]


@pytest.mark.parametrize("name", [name for name in python_files("engine") if is_pure(module_name(name))])
def test_the_pure_wing_imports_only_the_standard_library_and_config(name: str) -> None:
    wrong = []
    for line, module in imports(name):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top == "config":
            continue
        if top == "engine" and (is_pure(module) or module in ("engine", "engine.cache")):
            continue
        wrong.append(f"{name}:{line} imports {module}")
    assert not wrong


@pytest.mark.parametrize("name", python_files("engine"))
def test_the_pure_wing_tells_no_time_and_logs_nothing(name: str) -> None:
    if is_pure(module_name(name)):
        banned = {"time", "logging", "datetime", "random", "asyncio", "threading", "socket", "os"}
        assert not [f"{name}:{line} imports {module}" for line, module in imports(name) if module.split(".")[0] in banned]


@pytest.mark.parametrize("name", program())
def test_cpu_and_cuda_do_not_know_each_other(name: str) -> None:
    module = module_name(name)
    for mine, other in (("engine.cpu", "engine.cuda"), ("engine.cuda", "engine.cpu")):
        if module.startswith(mine):
            assert not [line for line, target in imports(name) if target.startswith(other)]


@pytest.mark.parametrize("name", python_files())
def test_one_line_imports_numba_cuda(name: str) -> None:
    if name != "engine/cuda/target.py":
        assert not [line for line, module in imports(name) if module == "numba.cuda" or module.startswith("numba.cuda.")]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", [module_name(n) for n in python_files("engine") if is_pure(module_name(n)) and not n.endswith("__init__.py")]
)
def test_importing_the_pure_wing_loads_no_library(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"torch", "numpy", "numba", "llvmlite", "aiohttp", "tokenizers", "jinja2"}


def test_importing_the_server_loads_nothing_heavy() -> None:
    """A spawned rank imports server.py again as `__mp_main__`; and `--help` must not wait for torch."""
    assert not loaded_by("import server") & {"torch", "numba", "llvmlite", "tokenizers", "sentencepiece", "safetensors", "aiohttp"}


def test_importing_the_api_loads_no_torch() -> None:
    modules = [module_name(name) for name in python_files("api", "text") if not name.endswith("__init__.py")]
    assert not loaded_by("import " + ", ".join(modules)) & {"torch", "numba", "llvmlite"}
