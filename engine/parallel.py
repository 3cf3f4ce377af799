"""`Ranks`: what tensor-parallel ranks say to each other; with one rank every call is a no-op.

gloo on the CPU (loopback only, rendezvous through a file in a private directory, so that nothing listens on a public
address), nccl on CUDA. Rank 0 samples and broadcasts the ids: ranks are told, they never vote.
"""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class Ranks:
    """One rank's view: `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1, private_dir: str = "", timeout_s: float = 60.0) -> None:
        self.rank = rank
        self.size = size
        if size > 1:
            self._join(private_dir, timeout_s)

    def _join(self, private_dir: str, timeout_s: float) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import torch.distributed as dist

        store = dist.FileStore(os.path.join(private_dir, "rendezvous"), self.size)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)
        self._dist = dist

    def all_reduce(self, x: Any) -> Any:
        """Sum a torch tensor or numpy array over ranks, in place; every rank gets bit-identical results."""
        if self.size > 1:
            import torch

            self._dist.all_reduce(torch.from_numpy(x) if isinstance(x, np.ndarray) else x)
        return x

    def smallest(self, value: int) -> int:
        """The least of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        import torch

        tensor = torch.tensor([value], dtype=torch.int64)
        self._dist.all_reduce(tensor, op=self._dist.ReduceOp.MIN)
        return int(tensor.item())

    def gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' [..., n] along the last axis, on every rank."""
        if self.size == 1:
            return x
        import torch

        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def from_rank0(self, values: np.ndarray) -> np.ndarray:
        """Rank 0's int64 array, on every rank (same shape everywhere)."""
        if self.size == 1:
            return values
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
        self._dist.broadcast(tensor, src=0)
        return tensor.numpy()
