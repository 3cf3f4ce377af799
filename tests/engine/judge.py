"""Whether ids are those of a model: the float32 reference's logits after the same ids, and how near an id is to the best.

Quantized or 16-bit arithmetic need not give the reference's ids where two logits are close.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.batch import Slots
from engine.cache.layout import KVLayout
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.parallel import Ranks
from engine.reference import ReferenceBackend
from engine.sequence import SamplingParams
from engine.step import Admit, StepPlan
from engine.weights import open_checkpoint

MARGIN = 0.06  # standard deviations of the logits
SESSION_LEN = 96


class Reference:
    """Logits after some ids, in float32; quant_policy: over a KV pool of so many bits."""

    def __init__(self, model: Path, spec: ModelSpec, quant_policy: int = 0) -> None:
        backend = ReferenceBackend()
        self._decoder = Decoder(
            spec, open_checkpoint(model, spec), backend, Ranks(), session_len=SESSION_LEN, exact=True, few_bits=quant_policy != 0
        )
        layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, SESSION_LEN, "float32", quant_policy)
        self._kv = backend.make_kv(layout, 1)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        slots, n = Slots(1, SESSION_LEN, SESSION_LEN), len(ids)
        plan = StepPlan(0, admits=(Admit(0, tuple(ids), n, (0,), greedy(1)),), slots=(0,), starts=(0,), counts=(n,), samples=(1,))
        slots.apply(plan)
        return self._decoder.forward(slots.batch(plan), self._kv)[0]

    def check(self, prompt: Sequence[int], answer: Sequence[int], margin: float = MARGIN) -> None:
        ids = list(prompt)
        for token in answer:
            logits = self.logits(ids)
            assert logits.max() - logits[token] <= margin * logits.std(), f"after {ids}: {token}, not {logits.argmax()}"
            ids.append(token)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
