"""The 8-bit group layout (GGUF Q8_0 kept as it is, Q5_0 without loss): `w[n, k] = scale[n, k // 32] * q[n, k]`, q int8. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP_SIZE = 32


@dataclass(frozen=True, slots=True, eq=False)
class W8:
    """q int8 [N, K], scale float32 [N, K / 32]."""

    q: np.ndarray
    scale: np.ndarray

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    def rows(self, start: int, stop: int) -> W8:
        return W8(self.q[start:stop], self.scale[start:stop])

    def columns(self, start: int, stop: int) -> W8:
        if start % GROUP_SIZE or stop % GROUP_SIZE:
            raise ValueError(f"input channels {start}:{stop} cut a group of {GROUP_SIZE} in two")
        return W8(self.q[:, start:stop], self.scale[:, start // GROUP_SIZE : stop // GROUP_SIZE])


def dequantize(w: W8) -> np.ndarray:
    """float32 [N, K]."""
    q = w.q.reshape(w.out_features, -1, GROUP_SIZE).astype(np.float32)
    return (q * w.scale[:, :, None]).reshape(w.out_features, w.in_features)


def concat_rows(parts: list[W8]) -> W8:
    """Stack output channels of weights with one K."""
    return W8(np.concatenate([p.q for p in parts]), np.concatenate([p.scale for p in parts]))
