"""Which backend computes: a handful of branches, each imported only when it is taken."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING

from config.schema import Config
from engine.cards import cards
from engine.errors import ConfigError
from engine.host import usable_cores
from engine.models.spec import ModelSpec

if TYPE_CHECKING:
    from engine.backend import Backend  # imports torch, which the memory plan and the server process do without


BFLOAT16_SINCE = (8, 0)  # compute capability
HOST_BATCH_SIZE, HOST_STEP_TOKENS = 64, 512
CUDA_BATCH_SIZE, CUDA_STEP_TOKENS = 256, 4096
LARGE_CARD, LARGE_CARD_BATCH_SIZE = 64 << 30, 512  # mixed workload on an H200: 9,908 output tokens a second, 9,419 with 256


def num_threads(config: Config) -> int:
    """CPU threads of a rank: the config's, else the cores this process may use, shared among the ranks.

    More threads than cores are refused: they wait for each other at every stage of every layer.
    """
    cores, wanted = usable_cores(), config.engine.num_threads
    if wanted > cores:
        raise ConfigError(f"engine.num_threads is {wanted}, but this process may use {cores} cores; set it to at most {cores}, or 0.")
    return wanted or max(1, cores // config.engine.tp)


def computing_dtype(config: Config, device: str, stored: str = "", cc: tuple[int, int] = BFLOAT16_SINCE) -> str:
    """The dtype of activations and KV. `auto` is bfloat16 where the CPU multiplies it natively, else float32; on a card the
    16-bit type that the checkpoint is `stored` in, else bfloat16; a card of a compute capability `cc` before 8.0 has only float16."""
    wanted = config.model.dtype
    if device == "reference":
        if wanted not in ("auto", "float32"):
            raise ConfigError(f"model.dtype = '{wanted}': the reference backend computes in float32 only.")
        return "float32"
    if device == "cuda":
        return _cuda_dtype(wanted, stored, cc)
    if wanted == "float16":
        raise ConfigError("model.dtype = 'float16' is not computed on the CPU; use 'bfloat16' or 'float32'.")
    if wanted != "auto":
        return wanted
    from engine.cpu.features import has_fast_bfloat16

    return "bfloat16" if has_fast_bfloat16() else "float32"


def _cuda_dtype(wanted: str, stored: str, cc: tuple[int, int]) -> str:
    if cc < BFLOAT16_SINCE:
        if wanted == "bfloat16":
            raise ConfigError(f"model.dtype = 'bfloat16' needs compute capability 8.0, this card has {cc[0]}.{cc[1]}; use 'float16'.")
        stored = "float16"
    if wanted == "float32":
        raise ConfigError("model.dtype = 'float32' is not computed on a card; use 'bfloat16' or 'float16', or engine.device = 'cpu'.")
    if wanted != "auto":
        return wanted
    return "float16" if stored == "float16" else "bfloat16"


def load_backend(config: Config, spec: ModelSpec, device: str, dtype: str) -> Backend:
    """The backends that compute on the host; a card has a runner of its own (`engine/cuda/runner.py`)."""
    if device == "reference":
        from engine.reference import ReferenceBackend

        return ReferenceBackend()
    if device == "cpu":
        from engine.cpu.backend import CpuBackend

        return CpuBackend(spec, dtype, num_threads(config))
    raise ConfigError(f"engine.device = '{device}' is not one of auto, cpu, cuda, reference, mock.")


def resolve_device(config: Config) -> str:
    """`auto` is cuda where the driver shows a card and numba-cuda is installed, else the CPU."""
    if config.engine.device != "auto":
        return config.engine.device
    return "cuda" if importlib.util.find_spec("numba_cuda") and cards() else "cpu"


def resolved(config: Config) -> Config:
    """The same configuration with what depends on the device filled in: engine.device, max_batch_size, max_prefill_token_num."""
    knobs = config.engine
    device = resolve_device(config)
    batch, tokens = (_cuda_batch_size(), CUDA_STEP_TOKENS) if device == "cuda" else (HOST_BATCH_SIZE, HOST_STEP_TOKENS)
    engine = dataclasses.replace(
        knobs,
        device=device,
        max_batch_size=knobs.max_batch_size or batch,
        max_prefill_token_num=knobs.max_prefill_token_num or tokens,
    )
    return dataclasses.replace(config, engine=engine)


def _cuda_batch_size() -> int:
    """What a sequence takes of its own (logits, sampling) is a megabyte: small change on a large card."""
    found = cards()
    return LARGE_CARD_BATCH_SIZE if found and all(card.total_bytes >= LARGE_CARD for card in found) else CUDA_BATCH_SIZE
