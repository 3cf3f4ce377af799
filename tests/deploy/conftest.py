"""The image's tree, once for all tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.image import Image


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    folder = Path(tempfile.mkdtemp(prefix="numbatch-image-"))
    folder.chmod(0o755)  # another user runs the server; pytest's own folders are closed to him
    built = Image.build(folder)
    yield built
    built.remove()
    shutil.rmtree(folder)
