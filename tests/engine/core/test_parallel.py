"""What ranks say to each other, over gloo, in processes of their own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import DeviceError
from engine.parallel import Ranks


def _rank(rank: int, size: int, private_dir: str, what: str, pipe: Any) -> None:
    ranks = Ranks(rank, size, private_dir, 60.0)
    try:
        pipe.send(TALKS[what](ranks))
    except DeviceError as error:
        pipe.send(str(error))


def _columns(ranks: Ranks) -> list[list[float]]:
    """7 columns in 3 shares of 3, 3 and 1."""
    own = np.arange(14, dtype=np.float32).reshape(2, 7)[:, ranks.rank * 3 : (ranks.rank + 1) * 3]
    return ranks.gather_columns(np.ascontiguousarray(own), 7).tolist()


TALKS = {
    "columns": _columns,
    "sum": lambda ranks: ranks.all_reduce(np.full(3, ranks.rank + 1, np.float32)).tolist(),
    "least": lambda ranks: ranks.smallest(10 - ranks.rank),
    "same": lambda ranks: ranks.check_same(0xABCD, 7),
    "differ": lambda ranks: ranks.check_same(ranks.rank, 7),
}


def talk(size: int, tmp_path: Path, what: str) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    processes = [context.Process(target=_rank, args=(r, size, str(tmp_path), what, pipes[r][1])) for r in range(size)]
    for process in processes:
        process.start()
    said = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    return said


def test_columns_of_uneven_shares_are_put_side_by_side(tmp_path: Path) -> None:
    assert talk(3, tmp_path, "columns") == [np.arange(14.0).reshape(2, 7).tolist()] * 3


@pytest.mark.parametrize(("what", "expected"), [("sum", [3.0] * 3), ("least", 9), ("same", None)])
def test_every_rank_gets_the_same_answer(tmp_path: Path, what: str, expected: Any) -> None:
    assert talk(2, tmp_path, what) == [expected, expected]


def test_ranks_that_disagree_all_fail_and_say_so(tmp_path: Path) -> None:
    assert talk(2, tmp_path, "differ") == ["The ranks disagree about step 7: digests ['00000000', '00000001']."] * 2
