"""How kernels are launched, as a table: which tile, how many warps, how deep a pipeline, for which card and shape.

Nothing is searched for at run time. `bench/tune.py` measures `candidates(..)` on a card and prints rows; a person commits them
under the date of the measurement. A shape without a row takes the row of its shape class, a card without rows the defaults at
the end, which are estimates from arithmetic, not measurements, until a dated row replaces them.

Also the sizes of packed 4-bit weights, for the memory plan. Knows no kernel's code; imports neither Numba nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

TILE_ROWS = 16  # output channels of a tile
CHUNK = 64  # input channels of a chunk
GROUP_SIZES = (32, 64, 128)
FEW_BUCKETS = (1, 8)  # rows of activations that one thread block of w4_few serves
ROW_BUCKETS = (16, 32, 64)  # .. of w4_matmul
HOPPER_BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256)  # rows of activations of the rows of the table for w4_hopper
WIDE = 8192  # output channels from which a shape is of the class "wide"
FEW_WIDE = 16384  # .. of w4_few
MOST_SHARED = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227}  # KiB a thread block may have
LEAST_SHARED = 99  # KiB, of a card not named above, cc 8.0 or newer
MIN_STEPS = 2  # a split leaves every thread block at least so many steps
MOST_SPLITS = 16
EVEN = -1  # waves of `FewLaunch`: parts of K such that multiprocessors end together
MOST_EVEN = 8  # parts that EVEN makes

# -- sizes of packed weights ------------------------------------------------------------------------------------------------------


def packed_shapes(n: int, k: int, group: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of `packed` and `pairs` (32-bit elements) of a weight [n, k]; drawn in `engine/cuda/w4_layout.py`."""
    if group not in GROUP_SIZES:
        raise ValueError(f"W4 groups of {group} input channels are not supported; use 32, 64 or 128")
    if n < 1 or k < 1 or k % group:
        raise ValueError(f"a 4-bit weight of {n} x {k} cannot be cut into groups of {group} input channels")
    tiles, chunks = -(-n // TILE_ROWS), -(-k // CHUNK)
    return (tiles, chunks, 32, 4), (tiles, chunks * CHUNK // group, 8, 2)


def packed_bytes(n: int, k: int, group: int) -> int:
    """Bytes on the card of a packed weight of n output and k input channels."""
    packed, pairs = packed_shapes(n, k, group)
    return 4 * (packed[0] * packed[1] * 128 + pairs[0] * pairs[1] * 16)


# -- the 4-bit product ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class W4Launch:
    """One way to launch `engine/cuda/w4_matmul.py`; the work split is drawn there.

    rows: activations a thread block serves (more rows, more thread blocks); tiles: 16-row weight tiles of a warp; warps_n x
    warps_k: warps side by side over output channels, and over input channels; stages: of the copy pipeline, one of them
    computed; waves: input channels are split over thread blocks until there are about so many for each multiprocessor, 0: they are
    not split.
    """

    rows: int
    tiles: int
    warps_n: int
    warps_k: int
    stages: int
    waves: int = 1

    @property
    def constants(self) -> tuple[int, int, int, int, int]:
        """What the kernel is compiled for."""
        return (self.rows, self.tiles, self.warps_n, self.warps_k, self.stages)

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def block_n(self) -> int:
        """Output channels of a thread block."""
        return TILE_ROWS * self.tiles * self.warps_n

    def shared_bytes(self, group: int) -> int:
        return W4Shared.of(self, group).total


@dataclass(frozen=True, slots=True)
class W4Shared:
    """Byte offsets in a thread block's shared memory: a ring of stages (weights | pairs | x), sums of x; at the end, in their place,
    results [warps_k, rows, block_n + 4] float32."""

    pairs_at: int
    x_at: int
    x_pitch: int  # bytes of a row of x; 64 more than its data, so that a quarter of a warp reads all 32 banks once
    stage: int
    sums: int  # bytes of one of two buffers, behind the ring
    total: int

    @classmethod
    def of(cls, launch: W4Launch, group: int) -> W4Shared:
        chunks = 2 if group == 128 else 1  # of a warp's unit of work
        warps, columns = launch.warps_n * launch.warps_k, -(-launch.rows // 8) * 8
        pairs_at = warps * launch.tiles * chunks * 512
        x_at = pairs_at + warps * launch.tiles * (chunks * CHUNK // group) * 64
        x_pitch = launch.warps_k * chunks * CHUNK * 2 + 64
        stage = x_at + launch.rows * x_pitch
        sums = launch.warps_k * sum_spans(group) * columns * 4
        results = launch.warps_k * launch.rows * (launch.block_n + 4) * 4
        return cls(pairs_at, x_at, x_pitch, stage, sums, max(launch.stages * stage + 2 * sums, results))


def steps_of_span(group: int) -> int:
    """mma steps (of 16 input channels) whose sum is scaled at once: those of a group."""
    return group // 16


def unit_channels(group: int) -> int:
    """Input channels that a warp takes at a time."""
    return 128 if group == 128 else CHUNK


def sum_spans(group: int) -> int:
    """Spans of a warp's unit of work."""
    return 2 if group == 32 else 1


@dataclass(frozen=True, slots=True)
class W4Grid:
    """Thread blocks of one product: blocks of output channels, each `splits` times, by blocks of rows; floats of the parts it writes;
    bytes of dynamic shared memory of a thread block."""

    column_blocks: int
    splits: int
    row_blocks: int
    part_floats: int
    shared_bytes: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.column_blocks * self.splits, self.row_blocks, 1)


def w4_grid(launch: W4Launch, m: int, n: int, k: int, group: int, multiprocessors: int) -> W4Grid:
    """How a product of m rows is cut."""
    row_blocks, column_blocks = -(-m // launch.rows), -(-n // launch.block_n)
    steps = -(-k // (launch.warps_k * unit_channels(group)))
    room = launch.waves * multiprocessors // (row_blocks * column_blocks)
    splits = max(1, min(room, steps // MIN_STEPS, MOST_SPLITS))
    return W4Grid(column_blocks, splits, row_blocks, splits * m * n if splits > 1 else 0, launch.shared_bytes(group))


# -- the 4-bit product of few rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FewLaunch:
    """One way to launch `engine/cuda/w4_few.py`; the work split is drawn there.

    rows: 1 or 8, activations a thread block serves; tiles: 16-row weight tiles of a warp; warps_n x warps_k: warps over output and
    over input channels; ahead: units of weights on their way; at_once: the next kernel may begin while this one works, not when it is
    through; waves: as of `W4Launch`, or EVEN.
    """

    rows: int
    tiles: int
    warps_n: int
    warps_k: int
    ahead: int
    at_once: bool = False
    waves: int = EVEN

    @property
    def constants(self) -> tuple[int, ...]:
        """What the kernel is compiled for."""
        return (self.rows, self.tiles, self.warps_n, self.warps_k, self.ahead, self.at_once)

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def block_n(self) -> int:
        """Output channels of a thread block."""
        return TILE_ROWS * self.tiles * self.warps_n

    def tile_slot(self, group: int) -> int:
        """Bytes of a tile's unit in a warp's ring: weights, then pairs, 8 bytes a lane and group."""
        unit = unit_channels(group)
        return unit // CHUNK * 512 + unit // group * 256

    def steps(self, k: int, group: int) -> int:
        """Of k input channels: a unit of each warp along K."""
        return -(-k // (self.warps_k * unit_channels(group)))

    def shared_bytes(self, k: int, group: int, splits: int) -> int:
        """Rings | sums of x | x; at the end, in their place, results [warps_k, rows, block_n + 4] float32."""
        channels = -(-self.steps(k, group) // splits) * self.warps_k * unit_channels(group)
        rings = self.threads // 32 * self.ahead * self.tiles * self.tile_slot(group)
        sums = channels // (16 * steps_of_span(group)) * 32
        return max(rings + sums + self.rows * (2 * channels + 64), 4 * self.warps_k * self.rows * (self.block_n + 4))


def few_grid(launch: FewLaunch, m: int, n: int, k: int, group: int, multiprocessors: int, shared_bytes: int) -> W4Grid:
    """How a product of m rows is cut; x of a part, with the rings, must fit in `shared_bytes`."""
    row_blocks, column_blocks = -(-m // launch.rows), -(-n // launch.block_n)
    steps = launch.steps(k, group)
    blocks = row_blocks * column_blocks
    if launch.waves == EVEN:  # steps of the busiest multiprocessor; a part more has its price in the kernel that adds them up
        splits = min(
            range(1, max(1, min(steps // MIN_STEPS, MOST_EVEN)) + 1),
            key=lambda parts: -(-blocks * parts // multiprocessors) * -(-steps // parts) * (1 + parts / 50),
        )
    else:
        splits = max(1, min(launch.waves * multiprocessors // blocks, steps // MIN_STEPS, MOST_SPLITS))
    while splits < steps and launch.shared_bytes(k, group, splits) > shared_bytes:
        splits += 1
    return W4Grid(column_blocks, splits, row_blocks, splits * m * n if splits > 1 else 0, launch.shared_bytes(k, group, splits))


# -- the 4-bit product with wgmma --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HopperLaunch:
    """One way to launch `engine/cuda/w4_hopper.py`; its registers must do without spills, which only the assembler knows.

    rows: of x that a thread block serves, a multiple of 8; warpgroups x tiles: of 64 output channels each; x_stages, w_stages: of the
    rings of x (2 or more) and of weights (2 to 8); ahead: steps of x on their way, in registers; parts: a wgmma takes rows / parts
    rows, so that sums of a group take fewer registers; together: wgmmas issued at a time (of the 2 to 8 of a group); blocks: thread
    blocks on a multiprocessor; waves: input channels are split over thread blocks until there are about so many for each
    multiprocessor, 0: they are not split.
    """

    rows: int
    warpgroups: int
    tiles: int
    x_stages: int
    w_stages: int
    ahead: int = 2
    parts: int = 1
    together: int = 1
    blocks: int = 1
    waves: int = 1

    @property
    def constants(self) -> tuple[int, ...]:
        """What the kernel is compiled for."""
        return (self.rows, self.warpgroups, self.tiles, self.x_stages, self.w_stages, self.ahead, self.parts, self.together, self.blocks)

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def block_n(self) -> int:
        """Output channels of a thread block."""
        return 64 * self.warpgroups * self.tiles

    def shared_bytes(self, group: int) -> int:
        return HopperShared.of(self, group).total


@dataclass(frozen=True, slots=True)
class HopperShared:
    """Bytes of a thread block's shared memory, from the next multiple of 1024: ring of x | rings of weights | mbarriers; at the end, in
    their place, results [rows, block_n + 4] float32."""

    x_stage: int
    w_stage: int  # of a warp: weights, then pairs, 8 bytes a lane, group and tile
    pairs_at: int
    w_warp: int
    w_at: int
    barriers_at: int
    total: int

    @classmethod
    def of(cls, launch: HopperLaunch, group: int) -> HopperShared:
        step = unit_channels(group)
        x_stage = launch.rows * step * 2
        pairs_at = launch.tiles * step // 64 * 512
        w_stage = pairs_at + launch.tiles * (step // group) * 256
        w_warp, w_at = w_stage * launch.w_stages, x_stage * launch.x_stages
        barriers_at = w_at + w_warp * launch.warpgroups * 4
        results = launch.rows * (launch.block_n + 4) * 4
        return cls(x_stage, w_stage, pairs_at, w_warp, w_at, barriers_at, 1024 + max(barriers_at + launch.x_stages * 16, results))


def hopper_grid(launch: HopperLaunch, m: int, n: int, k: int, group: int, multiprocessors: int) -> W4Grid:
    """How a product of m rows is cut."""
    row_blocks, column_blocks = -(-m // launch.rows), -(-n // launch.block_n)
    steps = -(-k // unit_channels(group))
    room = launch.waves * multiprocessors // (row_blocks * column_blocks)
    splits = max(1, min(room, steps // MIN_STEPS, MOST_SPLITS))
    return W4Grid(column_blocks, splits, row_blocks, splits * m * n if splits > 1 else 0, launch.shared_bytes(group))


# -- tables -----------------------------------------------------------------------------------------------------------------------


def row_bucket(m: int, buckets: tuple[int, ...] = ROW_BUCKETS) -> int:
    """The smallest bucket that holds m rows, or the largest bucket."""
    return next((rows for rows in buckets if m <= rows), buckets[-1])


def shape_class(bucket: int, n: int, wide: int = WIDE) -> str:
    """The class whose row a shape without a row of its own takes."""
    return f"{bucket} rows, {'wide' if n >= wide else 'narrow'}"


# Key: (kernel, compute capability, "rows n k" of one shape or a shape class). Newest first; a date and the card at each row.
TUNED: dict[tuple[str, tuple[int, int], str], W4Launch] = {
    # classes: the row of a shape of the class that was never far from the best of its other shapes (2026-11-20, H200)
    ("w4_matmul", (9, 0), "16 rows, narrow"): W4Launch(16, 2, 4, 2, 4, 1),
    ("w4_matmul", (9, 0), "16 rows, wide"): W4Launch(16, 2, 8, 2, 4, 0),
    ("w4_matmul", (9, 0), "32 rows, narrow"): W4Launch(32, 2, 4, 1, 3, 3),
    ("w4_matmul", (9, 0), "32 rows, wide"): W4Launch(32, 4, 7, 1, 4, 1),
    ("w4_matmul", (9, 0), "64 rows, narrow"): W4Launch(64, 2, 8, 1, 6, 1),
    ("w4_matmul", (9, 0), "64 rows, wide"): W4Launch(64, 2, 8, 1, 6, 1),
    ("w4_matmul", (9, 0), "16 4096 4096"): W4Launch(16, 2, 4, 2, 6, 1),  # 2026-11-20, H200, 7.66 us
    ("w4_matmul", (9, 0), "16 4096 14336"): W4Launch(16, 2, 4, 4, 4, 1),  # 2026-11-20, H200, 15.18 us
    ("w4_matmul", (9, 0), "16 6144 4096"): W4Launch(16, 3, 4, 2, 4, 1),  # 2026-11-20, H200, 9.31 us
    ("w4_matmul", (9, 0), "16 28672 4096"): W4Launch(16, 2, 8, 2, 4, 0),  # 2026-11-20, H200, 26.29 us
    ("w4_matmul", (9, 0), "32 4096 4096"): W4Launch(32, 2, 4, 2, 4, 1),  # 2026-11-20, H200, 9.60 us
    ("w4_matmul", (9, 0), "32 4096 14336"): W4Launch(32, 2, 8, 1, 4, 1),  # 2026-11-20, H200, 21.10 us
    ("w4_matmul", (9, 0), "32 6144 4096"): W4Launch(32, 2, 4, 1, 3, 3),  # 2026-11-20, H200, 12.55 us
    ("w4_matmul", (9, 0), "32 28672 4096"): W4Launch(32, 4, 7, 1, 4, 1),  # 2026-11-20, H200, 37.22 us
    ("w4_matmul", (9, 0), "64 4096 4096"): W4Launch(64, 2, 4, 2, 4, 1),  # 2026-11-20, H200, 13.71 us
    ("w4_matmul", (9, 0), "64 4096 14336"): W4Launch(64, 2, 8, 1, 6, 1),  # 2026-11-20, H200, 32.32 us
    ("w4_matmul", (9, 0), "64 6144 4096"): W4Launch(64, 2, 8, 1, 6, 1),  # 2026-11-20, H200, 19.45 us
    ("w4_matmul", (9, 0), "64 28672 4096"): W4Launch(64, 2, 8, 1, 6, 0),  # 2026-11-20, H200, 62.39 us
}

# Of `w4_hopper`, which runs on compute capability 9.0 alone: by "rows n k" of one shape or a shape class. The best of some hundred
# launches from 16 to 128 rows, of five beyond; the classes as above. 2026-11-20, H200.
_HOPPER_16, _HOPPER_16_SMALL = HopperLaunch(16, 4, 1, 3, 4, 2, 1, 4), HopperLaunch(16, 3, 1, 3, 4, 2, 1, 4)
_HOPPER_24 = HopperLaunch(24, 4, 1, 3, 4, 2, 1, 4)
_HOPPER_32, _HOPPER_48 = HopperLaunch(32, 4, 1, 3, 4, 2, 1, 1), HopperLaunch(48, 2, 2, 3, 4, 2, 1, 4)
_HOPPER_64, _HOPPER_64_SMALL = HopperLaunch(64, 2, 2, 3, 5, 2, 1, 1), HopperLaunch(64, 3, 1, 3, 6, 2, 1, 1)
HOPPER: dict[str, HopperLaunch] = {
    "16 rows, narrow": _HOPPER_16_SMALL,
    "16 rows, wide": _HOPPER_16,
    "24 rows, narrow": _HOPPER_24,
    "24 rows, wide": _HOPPER_24,
    "32 rows, narrow": _HOPPER_32,
    "32 rows, wide": _HOPPER_32,
    "48 rows, narrow": HopperLaunch(48, 3, 1, 3, 4, 1, 1, 4),
    "48 rows, wide": _HOPPER_48,
    "64 rows, narrow": HopperLaunch(64, 3, 1, 3, 4, 2, 1, 4),
    "64 rows, wide": _HOPPER_64,
    "96 rows, narrow": _HOPPER_48,
    "96 rows, wide": _HOPPER_48,
    "128 rows, narrow": _HOPPER_64_SMALL,
    "128 rows, wide": _HOPPER_64,
    "192 rows, narrow": _HOPPER_64_SMALL,
    "192 rows, wide": _HOPPER_64,
    "256 rows, narrow": _HOPPER_64,
    "256 rows, wide": _HOPPER_64,
    "24 6144 4096": HopperLaunch(24, 3, 1, 3, 4, 2, 1, 4),
    "32 6144 4096": HopperLaunch(32, 3, 1, 3, 4, 2, 1, 4),
    "48 4096 14336": _HOPPER_48,
    "64 4096 4096": HopperLaunch(64, 2, 1, 4, 8, 2, 1, 1),
    "96 6144 4096": HopperLaunch(48, 3, 1, 3, 4, 1, 1, 4),
    "96 4096 4096": HopperLaunch(96, 2, 1, 3, 4, 1, 1, 4),
    "128 4096 14336": _HOPPER_64,
    "256 6144 4096": _HOPPER_64_SMALL,
}

# Of `w4_few`, as above. 2026-11-20, H200.
FEW: dict[tuple[tuple[int, int], str], FewLaunch] = {
    ((9, 0), "1 rows, narrow"): FewLaunch(1, 1, 2, 8, 2, True),
    ((9, 0), "1 rows, wide"): FewLaunch(1, 1, 7, 2, 4, True),
    ((9, 0), "8 rows, narrow"): FewLaunch(8, 1, 4, 4, 6, True),
    ((9, 0), "8 rows, wide"): FewLaunch(8, 1, 7, 2, 4, True),
    ((9, 0), "1 6144 4096"): FewLaunch(1, 1, 6, 2, 4, True, 2),  # 6.59 us
    ((9, 0), "1 4096 4096"): FewLaunch(1, 1, 2, 8, 3, True, 2),  # 4.91 us
    ((9, 0), "1 28672 4096"): FewLaunch(1, 1, 7, 2, 4, True, 0),  # 16.08 us
    ((9, 0), "1 4096 14336"): FewLaunch(1, 1, 4, 7, 2, True, 1),  # 10.61 us
    ((9, 0), "8 6144 4096"): FewLaunch(8, 1, 3, 4, 6, True, 0),  # 7.54 us
    ((9, 0), "8 4096 4096"): FewLaunch(8, 1, 2, 8, 6, True, 0),  # 6.30 us
    ((9, 0), "8 28672 4096"): FewLaunch(8, 1, 14, 2, 3, True, 0),  # 18.55 us
    ((9, 0), "8 4096 14336"): FewLaunch(8, 1, 8, 2, 4, True, 1),  # 11.76 us
    # Llama-3.1-70B on one card, then the share of one of two
    ((9, 0), "1 10240 8192"): FewLaunch(1, 1, 4, 2, 3, False, 6),  # 14.38 us
    ((9, 0), "1 8192 8192"): FewLaunch(1, 1, 2, 8, 2, True, 0),  # 11.26 us
    ((9, 0), "1 57344 8192"): FewLaunch(1, 1, 7, 2, 4, True, 0),  # 61.28 us
    ((9, 0), "1 8192 28672"): FewLaunch(1, 1, 16, 2, 3, True, 1),  # 32.67 us
    ((9, 0), "1 5120 8192"): FewLaunch(1, 1, 2, 4, 2, True, 6),  # 8.65 us
    ((9, 0), "1 8192 4096"): FewLaunch(1, 1, 1, 8, 2, True, 0),  # 7.50 us
    ((9, 0), "1 28672 8192"): FewLaunch(1, 1, 7, 2, 4, True, 0),  # 31.97 us
    ((9, 0), "1 8192 14336"): FewLaunch(1, 1, 4, 2, 8, True, 2),  # 17.68 us
}
# Estimates, not measured: rings of about 40 KB a thread block, two of them on a multiprocessor.
FEW_DEFAULTS: dict[str, FewLaunch] = {
    "1 rows, narrow": FewLaunch(1, 1, 4, 2, 4),
    "1 rows, wide": FewLaunch(1, 1, 8, 1, 4),
    "8 rows, narrow": FewLaunch(8, 2, 4, 1, 4),
    "8 rows, wide": FewLaunch(8, 2, 4, 1, 4),
}

# Estimates, not measured: a pipeline of about 50 to 100 KB a multiprocessor (bandwidth x latency is 25), two thread blocks
# a multiprocessor where they fit, and activations read again at most as often as the weights once.
LARGE_SHARED: dict[str, W4Launch] = {
    "16 rows, narrow": W4Launch(16, 2, 4, 2, 4, 1),
    "16 rows, wide": W4Launch(16, 2, 4, 2, 4, 2),
    "32 rows, narrow": W4Launch(32, 2, 8, 1, 4, 1),
    "32 rows, wide": W4Launch(32, 2, 8, 1, 4, 1),
    "64 rows, narrow": W4Launch(64, 2, 8, 1, 4, 1),
    "64 rows, wide": W4Launch(64, 2, 8, 1, 4, 1),
}
SMALL_SHARED: dict[str, W4Launch] = {
    **LARGE_SHARED,
    "16 rows, narrow": W4Launch(16, 2, 4, 2, 3, 1),
    "16 rows, wide": W4Launch(16, 2, 4, 2, 3, 1),
    "32 rows, narrow": W4Launch(32, 2, 4, 1, 3, 1),
    "32 rows, wide": W4Launch(32, 2, 4, 1, 3, 1),
    "64 rows, narrow": W4Launch(64, 2, 4, 1, 3, 1),
    "64 rows, wide": W4Launch(64, 2, 4, 1, 3, 1),
}


def most_shared(cc: tuple[int, int]) -> int:
    """Bytes of shared memory that one thread block may have."""
    return 1024 * MOST_SHARED.get(cc, LEAST_SHARED)


def defaults(cc: tuple[int, int]) -> dict[str, W4Launch]:
    return LARGE_SHARED if most_shared(cc) >= 160 * 1024 else SMALL_SHARED


def w4_launch(cc: tuple[int, int], m: int, n: int, k: int) -> W4Launch:
    """The row for m rows of activations and a weight [n, k]: of the shape, of its class, or the default of the class."""
    kind = shape_class(row_bucket(m), n)
    for key in (f"{row_bucket(m)} {n} {k}", kind):
        if ("w4_matmul", cc, key) in TUNED:
            return TUNED["w4_matmul", cc, key]
    return defaults(cc)[kind]


def few_launch(cc: tuple[int, int], m: int, n: int, k: int) -> FewLaunch:
    """The same for `w4_few`."""
    bucket = row_bucket(m, FEW_BUCKETS)
    kind = shape_class(bucket, n, FEW_WIDE)
    return FEW.get((cc, f"{bucket} {n} {k}")) or FEW.get((cc, kind)) or FEW_DEFAULTS[kind]


def hopper_launch(m: int, n: int, k: int) -> HopperLaunch:
    """The row for m rows of activations and a weight [n, k]: of the shape, or of its class."""
    bucket = row_bucket(m, HOPPER_BUCKETS)
    return HOPPER.get(f"{bucket} {n} {k}") or HOPPER[shape_class(bucket, n)]


# From how many rows a kernel is the quickest of those that take a weight of the form; between it and w4_few's few w4_matmul is.
HOPPER_FROM: dict[tuple[tuple[int, int], str], int] = {((9, 0), "zero"): 9}  # 2026-11-20, H200


def w4_kernel(cc: tuple[int, int], form: str, m: int) -> str:
    """Which kernel multiplies m rows of activations with a packed weight."""
    if m <= FEW_BUCKETS[-1]:
        return "w4_few"
    return "w4_hopper" if m >= HOPPER_FROM.get((cc, form), m + 1) else "w4_matmul"


# From how many rows a dense 16-bit product is the faster one: (with a 16-bit copy that stays, through a scratch copy).
# Elsewhere estimates: the first from cuBLAS figures against the goals of this kernel, the second counts 4.5 bytes moved a weight.
DENSE_FROM: dict[tuple[tuple[int, int], str], tuple[int, int]] = {
    ((9, 0), "zero"): (97, 257),  # 2026-11-20, H200
    ((9, 0), "bias"): (33, 129),  # 2026-11-20, H200
}
DENSE_FROM_DEFAULT = (96, 384)


def dense_from(cc: tuple[int, int], form: str, resident: bool) -> int:
    """Rows from which the backend should use the dense product for a packed weight of the form."""
    return DENSE_FROM.get((cc, form), DENSE_FROM_DEFAULT)[0 if resident else 1]


def most_part_floats(cc: tuple[int, int], multiprocessors: int, n: int, k: int, group: int) -> int:
    """float32 numbers of parts that a packed product of any number of rows may write, in either form."""
    if cc < (8, 0):
        return 0
    most = 0
    for form in ("zero", "bias"):
        for m in range(1, dense_from(cc, form, resident=False)):
            kernel = w4_kernel(cc, form, m)
            if kernel == "w4_few":
                grid = few_grid(few_launch(cc, m, n, k), m, n, k, group, multiprocessors, most_shared(cc))
            elif kernel == "w4_hopper":
                grid = hopper_grid(hopper_launch(m, n, k), m, n, k, group, multiprocessors)
            else:
                grid = w4_grid(w4_launch(cc, m, n, k), m, n, k, group, multiprocessors)
            most = max(most, grid.part_floats)
    return most


@cache
def _space(rows: int) -> tuple[W4Launch, ...]:
    tiles = (1, 2, 4) if rows >= 32 else (1, 2, 3, 4)
    splits = [(n, k) for n in (1, 2, 4, 7, 8) for k in (1, 2, 4, 8, 16) if n * k in (4, 7, 8, 14, 16) and (rows == 16 or k <= 2)]
    return tuple(
        W4Launch(rows, t, n, k, stages, waves) for t in tiles for n, k in splits for stages in (3, 4, 6) for waves in (0, 1, 2, 3, 4)
    )


def candidates(cc: tuple[int, int], m: int, n: int, k: int, group: int) -> Iterator[W4Launch]:
    """What is worth measuring for a shape: launches that fit the card's shared memory and registers and leave no warp idle."""
    for launch in _space(row_bucket(m)):
        fragments = launch.tiles * -(-launch.rows // 8)  # 4 registers each
        resident = max(1, launch.waves)
        idle = launch.warps_k * 2 * CHUNK > k or launch.block_n > n
        registers = 64 + 4 * fragments * (2 if launch.rows <= 16 else 1) + 16 * launch.tiles
        if idle or launch.threads * registers * resident > 65536 or registers > 240:
            continue
        if launch.shared_bytes(group) <= most_shared(cc) and resident * launch.shared_bytes(group) <= most_shared(cc) + 1024:
            yield launch


@cache
def _few_space(rows: int) -> tuple[FewLaunch, ...]:
    splits = [(n, k) for n in (1, 2, 3, 4, 6, 7, 8, 12, 14, 16, 24, 28) for k in (1, 2, 4, 8, 16) if 4 <= n * k <= 32]
    return tuple(
        FewLaunch(rows, tiles, n, k, ahead, at_once, waves)
        for tiles in (1, 2) for n, k in splits for ahead in (2, 3, 4, 6, 8) if tiles * ahead <= 8
        for at_once in (False, True) for waves in (EVEN, 0, 1, 2, 4)
    )  # fmt: skip


def few_candidates(cc: tuple[int, int], m: int, n: int, k: int, group: int) -> Iterator[FewLaunch]:
    """The same for `w4_few`."""
    for launch in _few_space(row_bucket(m, FEW_BUCKETS)):
        idle = launch.warps_k * unit_channels(group) * MIN_STEPS > k or launch.block_n > n
        registers = 48 if launch.tiles == 1 else 80
        if not idle and launch.threads * registers <= 65536 and launch.shared_bytes(k, group, launch.steps(k, group)) <= most_shared(cc):
            yield launch


@cache
def _hopper_space(bucket: int) -> tuple[HopperLaunch, ...]:
    """Of the bucket's rows, or blocks of fewer where they are many."""
    served = (bucket,) if bucket < 96 else (bucket // 2, bucket) if bucket <= 128 else (64, 80, 96)
    pipelines = [(x, w, a, t) for x in (3, 4) for w in (4, 5, 6, 8) for a in (1, 2) for t in (1, 4)]
    return tuple(
        HopperLaunch(rows, groups, tiles, x, w, ahead, 1, together)
        for rows in served for groups in (2, 3, 4) for tiles in (1, 2) for x, w, ahead, together in pipelines
    )  # fmt: skip


def hopper_candidates(m: int, n: int, k: int, group: int) -> Iterator[HopperLaunch]:
    """The same for `w4_hopper`. Registers are an estimate; what spills is slow, not wrong."""
    for launch in _hopper_space(row_bucket(m, HOPPER_BUCKETS)):
        registers = 56 + launch.rows // 2 * (launch.tiles + 1)
        idle = launch.block_n > max(n, 64) or unit_channels(group) > k
        if not idle and launch.threads * registers <= 65536 and launch.shared_bytes(group) <= most_shared((9, 0)):
            yield launch
