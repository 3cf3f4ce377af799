"""Which backend computes: a handful of branches, each imported only when it is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from config.schema import Config
from engine.errors import ConfigError
from engine.host import usable_cores
from engine.models.spec import ModelSpec

if TYPE_CHECKING:
    from engine.backend import Backend  # imports torch, which the memory plan and the server process do without


def num_threads(config: Config) -> int:
    """CPU threads of a rank: the config's, else the cores this process may use, shared among the ranks.

    More threads than cores are refused: they wait for each other at every stage of every layer.
    """
    cores, wanted = usable_cores(), config.engine.num_threads
    if wanted > cores:
        raise ConfigError(f"engine.num_threads is {wanted}, but this process may use {cores} cores; set it to at most {cores}, or 0.")
    return wanted or max(1, cores // config.engine.tp)


def computing_dtype(config: Config, device: str) -> str:
    """The dtype of activations and KV: `auto` is bfloat16 where the CPU multiplies it natively, else float32."""
    wanted = config.model.dtype
    if device == "reference":
        if wanted not in ("auto", "float32"):
            raise ConfigError(f"model.dtype = '{wanted}': the reference backend computes in float32 only.")
        return "float32"
    if wanted == "float16":
        raise ConfigError("model.dtype = 'float16' is not computed on the CPU; use 'bfloat16' or 'float32'.")
    if wanted != "auto":
        return wanted
    from engine.cpu.features import has_fast_bfloat16

    return "bfloat16" if has_fast_bfloat16() else "float32"


def load_backend(config: Config, spec: ModelSpec, device: str, dtype: str) -> Backend:
    if device == "reference":
        from engine.reference import ReferenceBackend

        return ReferenceBackend()
    if device == "cpu":
        from engine.cpu.backend import CpuBackend

        return CpuBackend(spec, dtype, num_threads(config))
    raise ConfigError(f"engine.device = '{device}' is not one of auto, cpu, reference, mock.")


def resolve_device(config: Config) -> str:
    """`auto` means the CPU: the only device of this version."""
    return "cpu" if config.engine.device == "auto" else config.engine.device
