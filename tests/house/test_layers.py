"""Who may import whom. The table is architecture's; a line here fails before a habit forms."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable

from tests.house.tree import ROOMS, ROOT, imports, module_name, program, python_files

MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "formats": {"config"},
    "text": {"config", "formats"},
    "engine": {"config", "formats"},
    "quant": {"config", "formats", "text", "engine"},
    "api": {"config", "formats", "text", "engine"},
    "bench": {"config", "formats", "text", "engine", "api"},
    "server": {"config", "formats", "text", "engine", "api"},
    "numbatch": {"config", "formats", "text", "engine", "api"},
    "cli": {"config", "formats", "text", "engine", "quant", "api", "bench", "server", "numbatch"},
}
PURE_WING = ("sequence", "step", "errors", "scheduler", "cache")  # of engine/
NOT_PURE = ("engine.cache.store",)  # the tensors


def is_pure(module: str) -> bool:
    return module.split(".")[1:2] != [] and module.split(".")[1] in PURE_WING and module not in NOT_PURE


PURE = tuple(name for name in python_files("engine") if is_pure(module_name(name)))


def test_every_room_is_in_the_table() -> None:
    assert set(MAY_IMPORT) == {*ROOMS, "server", "numbatch"}


def offenders(names: Iterable[str], wrong: Callable[[str, str], bool]) -> list[str]:
    """`file:line imports module` for every import of the files that `wrong(file, module)`."""
    return [f"{name}:{line} imports {module}" for name in names for line, module in imports(name) if wrong(name, module)]


def test_rooms_import_downwards_only() -> None:
    def upwards(name: str, module: str) -> bool:
        room, target = module_name(name).split(".")[0], module.split(".")[0]
        return target in MAY_IMPORT and target not in MAY_IMPORT[room] | {room}

    assert not offenders(program(), upwards)


def test_imports_are_absolute() -> None:
    assert not offenders(program(), lambda name, module: module.startswith("."))


def test_the_pure_wing_imports_only_the_standard_library_and_config() -> None:
    def foreign(name: str, module: str) -> bool:
        top = module.split(".")[0]
        own = top == "engine" and (is_pure(module) or module in ("engine", "engine.cache"))
        return not (own or top in sys.stdlib_module_names or top == "config")

    assert len(PURE) > 5
    assert not offenders(PURE, foreign)


def test_the_pure_wing_tells_no_time_and_logs_nothing() -> None:
    banned = {"time", "logging", "datetime", "random", "asyncio", "threading", "socket", "os"}
    assert not offenders(PURE, lambda name, module: module.split(".")[0] in banned)


def test_cpu_and_cuda_do_not_know_each_other() -> None:
    assert not offenders(python_files("engine"), lambda name, module: name.startswith("engine/cpu/") and module.startswith("engine.cuda"))
    assert not offenders(python_files("engine"), lambda name, module: name.startswith("engine/cuda/") and module.startswith("engine.cpu"))


def test_one_line_imports_numba_cuda() -> None:
    everywhere = (name for name in python_files() if name != "engine/cuda/target.py")
    assert not offenders(everywhere, lambda name, module: f"{module}.".startswith("numba.cuda."))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_pure_wing_loads_no_library() -> None:
    modules = ", ".join(module_name(name) for name in PURE if not name.endswith("__init__.py"))
    assert not loaded_by(f"import {modules}") & {"torch", "numpy", "numba", "llvmlite", "aiohttp", "tokenizers", "jinja2"}


def test_importing_the_server_loads_nothing_heavy() -> None:
    """A spawned rank imports server.py again as `__mp_main__`; and `--help` must not wait for torch."""
    assert not loaded_by("import server") & {"torch", "numba", "llvmlite", "tokenizers", "sentencepiece", "safetensors", "aiohttp"}


def test_importing_the_api_loads_no_torch() -> None:
    modules = [module_name(name) for name in python_files("api", "text") if not name.endswith("__init__.py")]
    assert not loaded_by("import " + ", ".join(modules)) & {"torch", "numba", "llvmlite"}
