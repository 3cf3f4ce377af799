"""From a `Config` to an `Engine`: which executor, which runner, which backend. Everything heavy is imported late.

`build_engine` runs in the server process, `build_runner` where the model computes (a thread or a rank).
"""

from __future__ import annotations

import os
from pathlib import Path

from config.schema import Config
from config.wire import config_to_json
from engine.errors import ConfigError, DeviceError
from engine.executor import Executor, ProcessExecutor, StepRunner, ThreadExecutor
from engine.load_backend import resolved
from engine.loop import Engine
from engine.models.shard import largest_share
from engine.models.spec import ModelSpec, RopeSpec, apply_overrides, load_spec
from engine.parallel import Ranks

MOCK_SESSION_LEN = 8192
MOCK_BLOCKS = 4096
MOCK_VOCAB = 260  # ByteTokenizer: 256 bytes, bos, eos, two chat markers
MOCK_EOS = 257


def mock_spec() -> ModelSpec:
    """The model that `device = "mock"` pretends to be; its ids are the ByteTokenizer's."""
    return ModelSpec(
        family="mock", vocab_size=MOCK_VOCAB, hidden_size=0, intermediate_size=0, num_layers=0, num_heads=1, num_kv_heads=1,
        head_dim=0, rms_norm_eps=1e-6, max_position=MOCK_SESSION_LEN, rope=RopeSpec(), bos_token_id=256, eos_token_ids=(MOCK_EOS,),
    )  # fmt: skip


def resolve_spec(config: Config) -> ModelSpec:
    """Read the model's description (no weights, no torch); with the config's overrides applied."""
    if config.engine.device == "mock" and not config.model.path:
        return mock_spec()
    spec = load_spec(Path(config.model.path))
    wanted, found = config.model.model_format, spec.quant.method if spec.quant else ""
    if wanted not in ("auto", "hf", "gguf", found):  # of a path on disk the configuration's own checks said so already
        state = f"quantized by {found}" if found else "not quantized"
        raise ConfigError(f'model.model_format is "{wanted}", but the checkpoint is {state}; write "{found or "hf"}" or "auto".')
    return apply_overrides(spec, config.engine)


def session_len(config: Config, spec: ModelSpec) -> int:
    """Most tokens of one sequence: what the config asks for, else the trained length.

    Dynamic NTK can go `factor` times further, but is evaluated once for this length and bends short prompts too, so it
    is used only by who asks for it.
    """
    wanted = config.engine.session_len or spec.max_position
    if wanted > spec.longest:
        raise ConfigError(
            f"engine.session_len is {wanted}, but the model was made for {spec.longest} tokens; lower it or set engine.rope_scaling_factor."
        )
    return wanted


def build_engine(config: Config, spec: ModelSpec) -> Engine:
    """An engine that is not started yet. Raises ConfigError where the config contradicts itself or the model."""
    config = resolved(config)
    if config.engine.device != "mock":
        largest_share(spec, config.engine.tp)  # said here, not by each of the ranks once they have started
    return Engine(config, spec, session_len(config, spec), _executor(config))


def _executor(config: Config) -> Executor:
    knobs = config.engine
    if knobs.executor == "thread" and knobs.device == "cuda":
        raise ConfigError("engine.executor = 'thread' is for the CPU: a card is driven by a process of its own; set executor = 'auto'.")
    if knobs.executor == "process" or (knobs.executor == "auto" and (knobs.tp > 1 or knobs.device == "cuda")):
        return ProcessExecutor(config_to_json(config), knobs.tp, knobs.init_timeout_s)
    if knobs.tp > 1:
        raise ConfigError(f"engine.executor = 'thread' runs 1 rank, but engine.tp is {knobs.tp}; set executor = 'process'.")
    return ThreadExecutor(lambda: build_runner(config, Ranks()))


def build_runner(config: Config, ranks: Ranks) -> StepRunner:
    """Load the model (this rank's share), allocate the KV pool, compile and warm up."""
    config = resolved(config)
    spec = resolve_spec(config)
    if config.engine.device == "mock":
        from engine.mock import MockRunner

        return MockRunner(config, spec, session_len(config, spec), config.cache.num_blocks or MOCK_BLOCKS)
    _use_kernel_cache(config)
    if config.engine.device == "cuda":
        from engine.cuda.device import CudaDevice
        from engine.cuda.runner import CudaRunner

        return CudaRunner(config, spec, session_len(config, spec), ranks, CudaDevice(ranks.rank))
    from engine.runner import Runner

    return Runner(config, spec, session_len(config, spec), ranks)


def _use_kernel_cache(config: Config) -> None:
    """Compiled kernels go to the config's directory; numba reads the variable when it is first imported."""
    path = Path(config.engine.kernel_cache_dir).resolve()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(path, 0o700)
    except OSError as error:
        raise DeviceError(f"engine.kernel_cache_dir = {path} cannot be made: {error.strerror}.") from None
    os.environ.setdefault("NUMBA_CACHE_DIR", str(path))
