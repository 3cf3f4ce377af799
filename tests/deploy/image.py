"""What `docker build` would make of the checkout, as far as it is ours: the files, the environment, the user, the entry point.

No daemon is needed: the Dockerfile is read by a Dockerfile parser, .dockerignore by Docker's own rules, and the tree is copied.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
CACHE = "/var/cache/numbatch"
UID = 10001


def instructions() -> list[tuple[str, str]]:
    """(instruction, value) of the Dockerfile, without comments."""
    parser = DockerfileParser(path=str(ROOT / "Dockerfile"), env_replace=False)
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def last_stage() -> list[tuple[str, str]]:
    steps = instructions()
    start = max(number for number, (name, _) in enumerate(steps) if name == "FROM")
    return steps[start:]


def only(name: str) -> str:
    (value,) = [value for step, value in last_stage() if step == name]
    return value


def exec_form(name: str) -> list[str]:
    return list(json.loads(only(name)))


def environment() -> dict[str, str]:
    """ENV of the last stage."""
    return dict(word.partition("=")[::2] for word in only("ENV").split())


def copied() -> list[str]:
    """Names in the checkout that the last stage copies."""
    names = []
    for step, value in last_stage():
        if step == "COPY" and not value.startswith("--from"):
            *sources, _ = value.split()
            names += sources
    return names


def context() -> set[str]:
    """Files that the builder is given, relative to the checkout."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    kept = exclude_paths(str(ROOT), patterns, dockerfile="Dockerfile")
    return {name for name in kept if (ROOT / name).is_file()} - {"Dockerfile", ".dockerignore"}


@dataclass
class Image:
    """A folder `app` as the image has it, and a folder for the one place that can be written."""

    app: Path
    cache: Path

    @classmethod
    def build(cls, folder: Path) -> Image:
        app, cache = folder / "app", folder / "cache"
        wanted = copied()
        for name in context():
            if any(name == source or name.startswith(source + "/") for source in wanted):
                (app / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, app / name)
        cache.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(cache, UID, UID)
        for path in (app, *app.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)  # a read-only root
        return cls(app, cache)

    def command(self, *arguments: str) -> list[str]:
        words = exec_form("ENTRYPOINT")
        assert words[0] == "python"
        return [sys.executable, *words[1:], *arguments]

    def environ(self, **extra: str) -> dict[str, str]:
        """Only what the Dockerfile sets, with this machine's place for what is written."""
        values = {name: value.replace(CACHE, str(self.cache)) for name, value in environment().items()}
        return values | {"PATH": str(Path(sys.executable).parent)} | extra

    def user(self) -> dict[str, Any]:
        """Where the tests are root, the server is not; unless this machine's python lies where only root may look."""
        return {"user": UID, "group": UID, "extra_groups": []} if os.geteuid() == 0 and _open_to_all(Path(sys.executable)) else {}

    def run(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """To its end."""
        return subprocess.run(
            self.command(*arguments), cwd=self.app, env=self.environ(**extra), capture_output=True, text=True, timeout=60, **self.user()
        )

    def start(self, log: int, *arguments: str, **extra: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.app,
            env=self.environ(**extra),
            stdout=log,
            stderr=log,
            start_new_session=True,
            **self.user(),
        )

    def remove(self) -> None:
        for path in (self.app, *self.app.rglob("*")):
            if path.is_dir():
                path.chmod(stat.S_IRWXU)


def _open_to_all(program: Path) -> bool:
    """True where every folder on the way to the program, links followed, may be entered by anybody."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in (*program.parents, *program.resolve().parents))
