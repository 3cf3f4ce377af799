"""schemathesis against a whole server, in small; `python -m tests.e2e.fuzz --cases 2000` is the full number, all phases."""

from __future__ import annotations

from tests.e2e.fuzz import fuzz
from tests.e2e.support import Server


def test_no_generated_request_meets_a_5xx_or_an_unpublished_answer() -> None:
    with Server("server.log_level=ERROR", "engine.session_len=512") as server:
        code, cases, output = fuzz(server.ready(), 8, seed=7, phases="fuzzing")
        assert code == 0, output
        assert cases > 200
        assert server.get("/health")[0] == 200
        assert "failed" not in server.log
