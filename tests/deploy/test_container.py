"""The Dockerfile: no root, no compiler, every room; and its entry point starts, from the files it copies and nothing else."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.image import CACHE, ROOT, UID, Image, context, copied, environment, exec_form, instructions, last_stage, only
from tests.house.tree import ROOMS, imports, program


def test_no_root_and_no_compiler() -> None:
    assert only("USER") == f"{UID}:{UID}"
    bases = [value.split()[0] for step, value in instructions() if step == "FROM"]
    assert bases and all(base.endswith("-slim") for base in bases)
    words = " ".join(value for _, value in instructions())
    assert not re.search(r"\b(apt-get|apk|gcc|g\+\+|build-essential|nvcc|cmake|curl|wget)\b", words)
    assert "--only-binary :all:" in words and "--no-cache-dir" in words
    assert exec_form("ENTRYPOINT") == ["python", "server.py"]
    assert only("STOPSIGNAL") == "SIGTERM"
    assert environment()["NUMBATCH_ENGINE_KERNEL_CACHE_DIR"].startswith(only("VOLUME")) and only("VOLUME") == CACHE


def test_the_image_holds_what_the_program_imports() -> None:
    present = {name.split("/")[0] for name in copied()}
    needed = {module.split(".")[0] for name in program() if name.split("/")[0] in present for _, module in imports(name)} & set(ROOMS)
    assert needed <= present
    assert {"server.py", "LICENSE"} <= present
    assert "tests" not in present


def test_the_builder_gets_nothing_else() -> None:
    """No model, no .git, no key beside the checkout travels to the builder."""
    wanted = (*copied(), "pyproject.toml")
    extra = [name for name in context() if not any(name == source or name.startswith(source + "/") for source in wanted)]
    assert not extra
    assert not [name for name in context() if "__pycache__" in name or name.endswith((".pyc", ".gguf", ".key", ".pem"))]
    for source in wanted:
        assert any(name == source or name.startswith(source + "/") for name in context()), source


@pytest.mark.parametrize("extra", ["", "cuda"])
def test_the_libraries_are_those_of_pyproject(extra: str) -> None:
    (run,) = [value for step, value in instructions() if step == "RUN" and "requirements.txt" in value]
    program_text = next(words[words.index("-c") + 1] for part in run.split("&&") if "-c" in (words := shlex.split(part)))
    ended = subprocess.run([sys.executable, "-c", program_text, extra], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ended.stdout.splitlines() == project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])


def test_the_python_of_the_image_is_new_enough() -> None:
    (value,) = [value for step, value in instructions() if step == "ARG" and value.startswith("PYTHON=")]
    assert tuple(map(int, value.partition("=")[2].split("."))) >= (3, 11)


def test_without_keys_it_does_not_start(image: Image) -> None:
    ended = image.run("--check", NUMBATCH_ENGINE_DEVICE="mock")
    assert ended.returncode == 2 and "--insecure" in ended.stderr
    assert image.run("--check", NUMBATCH_ENGINE_DEVICE="mock", NUMBATCH_API_KEYS="a-key-of-some-length-0123456789").returncode == 0


def test_every_program_of_the_image_can_be_imported(image: Image) -> None:
    """From the copied files, and no others: the checkout is not on the path."""
    code = (
        "import sys, api.lifecycle, cli.main, engine.build, quant\n"
        "print(*{m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in sys.argv[1:] and getattr(m, '__file__', None)}, sep='\\n')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *ROOMS], cwd=image.app, env=image.environ(), capture_output=True, text=True, timeout=60, **image.user()
    )
    assert ended.returncode == 0, ended.stderr
    files = [Path(line) for line in ended.stdout.splitlines()]
    assert files and all(file.is_relative_to(image.app) for file in files)


def test_nothing_can_be_written_but_the_cache(image: Image) -> None:
    before = set(image.app.rglob("*"))
    assert image.run("--version").returncode == 0
    assert set(image.app.rglob("*")) == before
    assert [value for step, value in last_stage() if step == "VOLUME"] == [CACHE]
