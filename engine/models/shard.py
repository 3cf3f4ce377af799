"""Which part of a model's dimensions a tensor-parallel rank holds. No torch: the memory plan asks, too."""

from __future__ import annotations

from dataclasses import dataclass

from engine.awq import PACK
from engine.errors import ConfigError
from engine.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of the model's dimensions."""

    heads: slice
    kv_heads: slice
    intermediate: slice
    vocab: slice  # padded up to a multiple of the ranks: the last shard may be short

    @property
    def num_heads(self) -> int:
        return self.heads.stop - self.heads.start

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads.stop - self.kv_heads.start


def make_shard(spec: ModelSpec, rank: int, size: int) -> Shard:
    """Whole KV heads with their query heads where there are enough (shares may differ by one), else one KV head held by
    several ranks. Raises ConfigError where the model cannot be cut into `size` parts."""
    if spec.num_kv_heads >= size:
        kv_heads = _share(spec.num_kv_heads, rank, size)
        group = spec.num_heads // spec.num_kv_heads
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
    elif size % spec.num_kv_heads or spec.num_heads % size:
        raise ConfigError(f"engine.tp = {size} does not fit {spec.num_heads} heads over {spec.num_kv_heads} KV heads; use fewer ranks.")
    else:
        heads = _share(spec.num_heads, rank, size)
        kv_head = rank * spec.num_kv_heads // size
        kv_heads = slice(kv_head, kv_head + 1)
    # cut between quantization groups where the dimension allows it
    unit = next((u for u in (128, 64, 32) if spec.intermediate_size % u == 0 and spec.intermediate_size // u >= size), 1)
    intermediate = _share(spec.intermediate_size // unit, rank, size)
    vocab_each = -(-spec.vocab_size // size)
    shard = Shard(
        heads=heads,
        kv_heads=kv_heads,
        intermediate=slice(intermediate.start * unit, intermediate.stop * unit),
        vocab=slice(min(rank * vocab_each, spec.vocab_size), min((rank + 1) * vocab_each, spec.vocab_size)),
    )
    if spec.awq is not None and size > 1:
        _check_groups(spec, shard, size, spec.awq.group_size)
    return shard


@dataclass(frozen=True, slots=True)
class Share:
    """The largest rank's part of the dimensions that are cut."""

    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


def largest_share(spec: ModelSpec, size: int) -> Share:
    """ConfigError where the model cannot be cut into `size` parts."""
    shards = [make_shard(spec, rank, size) for rank in range(size)]
    return Share(
        heads=max(s.num_heads for s in shards),
        kv_heads=max(s.num_kv_heads for s in shards),
        intermediate=max(s.intermediate.stop - s.intermediate.start for s in shards),
        vocab=max(s.vocab.stop - s.vocab.start for s in shards),
    )


def _check_groups(spec: ModelSpec, shard: Shard, size: int, group: int) -> None:
    """An AWQ weight is cut between its groups (input channels of o and down) and its int32s of 8 output channels."""
    cuts = (
        ("heads' outputs", (shard.heads.start * spec.head_dim, shard.heads.stop * spec.head_dim), group),
        ("KV heads", (shard.kv_heads.start * spec.head_dim, shard.kv_heads.stop * spec.head_dim), PACK),
        ("intermediate channels", (shard.intermediate.start, shard.intermediate.stop), group),
    )
    for what, (start, stop), unit in cuts:
        if start % unit or stop % unit:
            raise ConfigError(
                f"engine.tp = {size} gives a rank {what} {start} to {stop - 1}, which cuts a group of {unit} of this AWQ "
                "checkpoint in two; use fewer ranks."
            )


def _share(count: int, rank: int, size: int) -> slice:
    """Rank's part of `count` things, in order; parts differ by at most one."""
    return slice(rank * count // size, (rank + 1) * count // size)
