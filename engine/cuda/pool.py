"""One layer of the KV pool as a tensor: is it what a kernel was made for? Imported by kernels that run without PTX too."""

from __future__ import annotations

import torch

from engine.cache.layout import KVLayout

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_pool(pool: torch.Tensor, layout: KVLayout) -> None:
    """ValueError unless `pool` is one layer's of this layout."""
    kind = torch.uint8 if layout.quant_policy else DTYPES[layout.dtype]
    block = layout.shape(1)[2:]
    if pool.shape[1:] != block or pool.dtype != kind or not pool.is_contiguous() or pool.data_ptr() % 16:
        raise ValueError(f"the pool is {pool.dtype} {tuple(pool.shape)}, not consecutive {kind} [blocks, *{tuple(block)}] on 16 bytes")
