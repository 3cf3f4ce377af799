"""`Ranks`: what tensor-parallel ranks say to each other; with one rank every call is a no-op.

gloo on the CPU (loopback only, rendezvous through a file in a private directory, so that nothing listens on a public
address), nccl on CUDA. Rank 0 samples and broadcasts the ids: ranks are told, they never vote.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Unsummed:
    """This rank's part of a sum over ranks that the operation which reads it takes."""

    x: Any


class Ranks:
    """One rank's view: `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1, private_dir: str = "", timeout_s: float = 60.0, cuda: bool = False) -> None:
        self.rank = rank
        self.size = size
        self.defers: Callable[[Any], bool] | None = None  # whose sum is left to what reads it (engine/cuda/all_reduce.py)
        if size > 1:
            self._join(private_dir, timeout_s, cuda)

    def _join(self, private_dir: str, timeout_s: float, cuda: bool) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import torch.distributed as dist

        store = dist.FileStore(os.path.join(private_dir, "rendezvous"), self.size)
        timeout = datetime.timedelta(seconds=timeout_s)
        if cuda:
            import torch

            torch.cuda.set_device(self.rank)  # before NCCL asks for the current card
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.size, timeout=timeout
        )
        self._dist = dist
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12
        self.group = dist.group.WORLD

    def all_reduce(self, x: Any) -> Any:
        """Sum a torch tensor or numpy array over ranks, in place; every rank gets bit-identical results. `Unsummed` where the
        backend's next operation does it."""
        if self.defers is not None and self.defers(x):
            return Unsummed(x)
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

    def gather_columns(self, x: Any, total: int) -> Any:
        """The ranks' columns side by side, [rows, total] on every rank: x [rows, n] is a torch tensor or numpy array, n is
        ceil(total / size) on every rank but the last ones, whose shares may be short."""
        if self.size == 1:
            return x
        import torch

        own = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        each = -(-total // self.size)
        padded = own if own.shape[1] == each else torch.nn.functional.pad(own, (0, each - own.shape[1]))
        parts = padded.new_empty((self.size, *padded.shape))
        self._gather(parts.view(-1, each), padded.contiguous())
        whole = parts.transpose(0, 1).reshape(len(own), self.size * each)[:, :total].contiguous()
        return whole.numpy() if isinstance(x, np.ndarray) else whole

    def check_same(self, digest: int, step: int) -> None:
        """DeviceError on every rank unless all of them give the same number for this step (`engine.check_ranks`)."""
        if self.size == 1:
            return
        import torch

        own, all_of_them = torch.tensor([digest], dtype=torch.int64), torch.empty(self.size, dtype=torch.int64)
        self._gather(all_of_them, own)
        if len(set(all_of_them.tolist())) > 1:
            raise DeviceError(f"The ranks disagree about step {step}: digests {[f'{d:08x}' for d in all_of_them.tolist()]}.")

    def from_rank0(self, values: np.ndarray) -> np.ndarray:
        """Rank 0's int64 array, on every rank (same shape everywhere)."""
        if self.size == 1:
            return values
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
        self._dist.broadcast(tensor, src=0)
        return tensor.numpy()
