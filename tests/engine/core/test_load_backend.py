"""What a configuration leaves to the machine."""

from __future__ import annotations

import pytest

from config.load import load_config
from engine import load_backend
from engine.cards import Card


@pytest.mark.parametrize(("gib", "slots"), [((141,), 512), ((80, 80), 512), ((80, 24), 256), ((24,), 256), ((), 256)])
def test_a_large_card_runs_more_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch, gib: tuple[int, ...], slots: int) -> None:
    monkeypatch.setattr(load_backend, "cards", lambda: [Card("a card", (9, 0), n << 30, n << 30) for n in gib])

    def batch(*sets: str) -> int:
        return load_backend.resolved(load_config(None, sets=["model.path=x", *sets]).config).engine.max_batch_size

    assert batch("engine.device=cuda") == slots
    assert batch("engine.device=cuda", "engine.max_batch_size=9") == 9
    assert batch("engine.device=cpu") == 64
