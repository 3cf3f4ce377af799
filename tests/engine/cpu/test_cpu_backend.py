"""The CPU backend's operations against the reference, its pass against its operations, its threads."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from engine.errors import ConfigError
from tests.engine.cpu import checks

DTYPES = ("bfloat16", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "threads"), [(960, 576, 2), (33, 50, 1), (100, 96, 2), (16, 256, 1), (48, 128, 3)])
def test_linear(dtype: str, n: int, k: int, threads: int) -> None:
    checks.check_linear(dtype, threads, n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", checks.HEADS, ids=str)
@pytest.mark.parametrize(("block_len", "window", "threads"), [(1, 0, 2), (7, 5, 1), (64, 100, 2), (128, 0, 3), (16, 64, 2)])
def test_rope_store_and_attention(dtype: str, heads: tuple[int, int, int], block_len: int, window: int, threads: int) -> None:
    checks.check_attention(dtype, threads, heads, block_len, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("heads", "block_len", "window", "threads"),
    [((9, 3, 64), 64, 100, 2), ((8, 2, 128), 16, 0, 2), ((6, 6, 48), 7, 5, 1), ((4, 4, 80), 1, 64, 3), ((7, 1, 96), 128, 0, 2)],
    ids=str,
)
def test_a_quantized_pool(dtype: str, bits: int, heads: tuple[int, int, int], block_len: int, window: int, threads: int) -> None:
    checks.check_quantized(dtype, threads, heads, block_len, window, bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_row_operations(dtype: str, threads: int) -> None:
    checks.check_rows(dtype, threads)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "w4"), ("bfloat16", "dense"), ("float32", "dense")])
@pytest.mark.parametrize(("threads", "window"), [(1, 0), (2, 0), (3, 40)])
def test_the_pass_equals_the_operations_and_rows_do_not_depend_on_neighbours(dtype: str, kind: str, threads: int, window: int) -> None:
    checks.check_pass(dtype, threads, kind, window)


def test_prompt_parts_give_what_the_whole_prompt_gives() -> None:
    """Cut at any place into parts of at least two tokens, a prompt's hidden states are the same bits."""
    rng = np.random.default_rng(1)
    model = checks.spec()
    with checks.backend(model, "bfloat16", 2) as cpu:
        decoder = checks.make_decoder(cpu, model, rng, "w4")
        cpu.bind(decoder)
        whole, blocks = checks.make_batch(((150, 150),), 16, rng)
        kv = cpu.make_kv(checks.KVLayout(2, 3, 64, 16, "bfloat16"), blocks)
        x = rng.standard_normal((150, 576)).astype(np.float32)
        kv[:] = 0x7FC0
        wanted = cpu.run_layers(x.copy(), cpu.begin(whole))
        kv[:] = 0x7FC0
        cuts, parts = [0, 2, 9, 73, 137, 150], []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            part = checks.Batch(
                whole.ids[start:stop], whole.positions[start:stop], whole.kv_slots[start:stop], np.array([0, stop - start], np.int32),
                np.array([stop], np.int32), whole.tables, np.zeros(0, np.int32), (), 0,
            )  # fmt: skip
            parts.append(cpu.run_layers(x[start:stop].copy(), cpu.begin(part)))
        np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_a_nan_in_the_cache_reaches_the_output_of_its_row_only() -> None:
    rng = np.random.default_rng(2)
    model = checks.spec()
    batch, blocks = checks.make_batch(((40, 1), (50, 1), (30, 5)), 16, rng)
    with checks.backend(model, "bfloat16", 2) as cpu:
        pool = cpu.make_kv(checks.KVLayout(1, 3, 64, 16, "bfloat16"), blocks)[0]
        pool[:] = checks.bits_of(rng.standard_normal(pool.shape))
        pool[batch.tables[1, 0], 0, :, 3] = 0x7FC0
        out = cpu.attention(rng.standard_normal((7, 9, 64)).astype(np.float32), cpu.begin(batch), pool, 0)
        assert np.isnan(out[1]).all()
        assert np.isfinite(np.delete(out, 1, axis=0)).all()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("cpu", "features"), [("x86-64-v3", "+avx2,+fma,+f16c,+bmi2"), ("skylake-avx512", "+avx512f,+avx512bw,+avx512vl,+avx512dq,+fma,+f16c")]
)
def test_the_portable_path(cpu: str, features: str) -> None:
    """The same checks where Numba compiles for a CPU without bfloat16 products, and without AVX-512."""
    if os.uname().machine != "x86_64":
        pytest.skip("names x86 CPUs")
    if "avx512f" in features:
        import llvmlite.binding as llvm

        if not llvm.get_host_cpu_features().get("avx512f"):
            pytest.skip("this CPU has no AVX-512")
    env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-m", "tests.engine.cpu.checks"], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_threads_end_with_the_backend() -> None:
    before = threading.active_count()
    cpu = checks.CpuBackend(checks.spec(), "bfloat16", 4)
    assert threading.active_count() == before + 3
    cpu.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        cpu.rms_norm(np.ones((1, 16), np.float32), np.ones(16, np.float32), 1e-5)
    forgotten = checks.CpuBackend(checks.spec(), "bfloat16", 4)
    del forgotten
    gc.collect()
    assert threading.active_count() == before


def test_refusals_name_the_key() -> None:
    with pytest.raises(ConfigError, match="model.dtype"):
        checks.CpuBackend(checks.spec(), "float16", 1)
    with pytest.raises(ConfigError, match="engine.num_threads"):
        checks.CpuBackend(checks.spec(), "float32", 0)
    with checks.backend(checks.spec(), "float32", 1) as cpu, pytest.raises(ConfigError, match="float16"):
        cpu.make_kv(checks.KVLayout(1, 3, 64, 16, "float16"), 4)
