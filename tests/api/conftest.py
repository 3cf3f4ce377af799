"""One mock server a test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.harness import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running
        running.settled()
