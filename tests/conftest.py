"""What every test may ask for: the material beside the checkout, model files, a quiet environment.

Nothing here downloads: a model is found in `.models` (where `make demo` puts it) or in $NUMBATCH_MODELS, and a test
that needs one skips, saying so, where it is absent. Compiled kernels are kept in `.cache/kernels` between runs.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Before any test module is imported: a knob or proxy of the caller's must not change what tests see."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in list(os.environ):
        if name.startswith("NUMBATCH_") and name != "NUMBATCH_MODELS":
            del os.environ[name]
    kernels = ROOT / ".cache" / "kernels"
    kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["NUMBA_CACHE_DIR"] = str(kernels)  # read by numba when it is first imported, here and in child processes
    os.environ["PYTHONFAULTHANDLER"] = "1"  # a child that dies of a signal says where
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """The project's shared test material, looked for in `../shared/assets` of the checkout and of the folders above it."""
    for folder in ROOT.parents:
        if (folder / "shared" / "assets").is_dir():
            return folder / "shared" / "assets"
    pytest.skip("no shared/assets beside the checkout")


def find_model(name: str) -> Path | None:
    """The model file `name`, or None where nobody has fetched it."""
    folders = [ROOT / ".models", *([Path(os.environ["NUMBATCH_MODELS"])] if os.environ.get("NUMBATCH_MODELS") else [])]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The first folder that may hold model files and exists."""
    for folder in (ROOT / ".models", Path(os.environ.get("NUMBATCH_MODELS") or ROOT / ".models")):
        if folder.is_dir():
            return folder
    pytest.skip("no model files: python -m cli.fetch smollm2 --to .models, or set NUMBATCH_MODELS")


def _model(name: str, file: str) -> Path:
    found = find_model(file)
    if found is None:
        pytest.skip(f"{file} is not here: python -m cli.fetch {name} --to .models, or set NUMBATCH_MODELS")
    return found


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _model("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def qwen05() -> Path:
    return _model("qwen05", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


@pytest.fixture(scope="session")
def tinyllama() -> Path:
    return _model("tinyllama", "tinyllama-1.1b-chat-v1.0.iq2_xxs.gguf")


@pytest.fixture(scope="session")
def stories15m() -> Path:
    return _model("stories15m", "stories15M.bin")
