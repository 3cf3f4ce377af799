"""What the house tests look at: the files that git tracks or would track, parsed once."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("config", "formats", "text", "engine", "quant", "api", "bench", "cli")  # every folder of the program
SERVER = "server.py"


@cache
def files() -> tuple[str, ...]:
    """Repository-relative names, ignored files left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return tuple(sorted(name for name in listed if name and (ROOT / name).is_file()))


def python_files(*rooms: str) -> tuple[str, ...]:
    """All Python files of the rooms named (and `server.py` if it is among them); of everything when none is named."""
    every = (name for name in files() if name.endswith(".py"))
    return tuple(name for name in every if not rooms or name.split("/")[0] in rooms)


def program() -> tuple[str, ...]:
    """The program's own Python files: rooms and server.py, no tests."""
    return python_files(*ROOMS, SERVER, "numbatch.py")


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def module_name(name: str) -> str:
    """`engine/cache/blocks.py` -> `engine.cache.blocks`."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imports(name: str) -> tuple[tuple[int, str], ...]:
    """(line, dotted module) for every import of a file, wherever it stands; `from a import b` counts as a and a.b."""
    return tuple(imports_of(parsed(name)))


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def dotted(node: ast.AST) -> str:
    """`time.time` of an attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
