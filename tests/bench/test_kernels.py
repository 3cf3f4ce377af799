"""bench.kernels: the parts of a card's run on the emulated card, the CPU's run, and the report that needs no card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba_cuda")

from bench import compile_only, kernels
from bench.gpu_time import MOST_COPIES, GraphTimer, WallTimer, copies, relative_error
from bench.kernels_cuda import TOYS, CudaBench, Shapes
from engine.cuda import ceilings
from engine.cuda.launch import Library, Variant
from tests.ptx.device import EmulatedDevice

TINY = Shapes(
    hidden=64, inner=128, heads=4, kv_heads=2, head_dim=32, block_seq_len=16, vocab=300, products=(("a", 128, 128),), rows=(1, 7),
    decode=((2, 40),), prompts=(), small=(3,), sampled=(1,), max_rows=4, read_bytes=1 << 18, dense=(32, 64, 64),
)  # fmt: skip


@pytest.fixture
def bench(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaBench:
    monkeypatch.setattr(ceilings, "SHAPES", ((256, 8, 4),))
    device = EmulatedDevice(multiprocessors=2)
    return CudaBench(device, Library(device, root / ".cache/kernels"), WallTimer(device), TINY, "bfloat16", tmp_path / "rows.jsonl")


def test_every_operation_is_checked_and_kept(bench: CudaBench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run({"products", "decode_attention", "elementwise", "head"})
    out = bench.result()
    assert not out["failed"] and out["emulated"] and out["ceilings"]["read_gb_s"] > 0
    seen = {row["op"] for row in out["rows"]}
    assert seen >= {
        "w4",
        "16-bit copy",
        "dequantize",
        "decode attention",
        "rms_norm",
        "add_rms_norm",
        "silu_mul",
        "embed",
        "rope_store",
        "output head",
    }
    assert all(row["error"] is None or row["error"] < 1e-2 for row in out["rows"])
    assert set(out["w4_layer_us"]) == {"1", "7"}
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["op"] for row in kept] == [row["op"] for row in out["rows"]]
    assert "layer total" in capsys.readouterr().out


def test_what_goes_wrong_is_said_and_the_rest_goes_on(bench: CudaBench) -> None:
    bench.ceilings()
    bench.part("broken", lambda: 1 // 0)
    bench.measure("op", "case", [lambda: None], error=0.5)
    bench.measure("op", "nan", [lambda: None], error=float("nan"))
    assert bench.failed[0].startswith("broken: ZeroDivisionError")
    assert "differs from the reference by 0.5" in bench.failed[1] and "nan" in bench.failed[2]


def test_toy_shapes_are_ones_that_the_operations_take() -> None:
    for shapes in TOYS:
        assert shapes.heads % shapes.kv_heads == 0 and all(k % shapes.group == 0 and n % 8 == 0 for _, n, k in shapes.products)


def test_rotations_outgrow_the_cache() -> None:
    assert copies(200 << 20) == 1 and copies(61e6) == 4 and copies(1) == MOST_COPIES and copies(1 << 40, 2) == 2
    assert relative_error(torch.tensor([3.0, 4.0]), [3.0, 5.0]) == pytest.approx(1 / 34**0.5)
    assert not relative_error(torch.tensor([float("nan")]), [1.0]) <= 1.0


def test_compile_only_says_registers_stack_and_spills(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--compile-only", "--sm", "80,90", "--match", "rms_norm_576_bfloat16_rows", "--processes", "1", "--json"]
    assert kernels.main(words) == 0
    (eighty, ninety) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["kernels"]
    assert set(eighty) == {"kernel", "sm", "registers", "stack_bytes", "spill_bytes"}
    assert (eighty["sm"], ninety["sm"]) == (80, 90) and 8 < ninety["registers"] < 64 and ninety["stack_bytes"] == 0


def test_every_kind_of_kernel_is_in_the_list() -> None:
    factories = {v.factory for v in compile_only.variants(90)}
    assert factories >= {
        "rms_norm", "silu_mul", "embed", "take_rows", "apply_updates", "rope_store", "paged_decode", "decode_schedule", "prefill", "w4_few", "w4_matmul",
        "w4_hopper", "pack_awq", "pack_w4", "dequantize", "scan", "draw", "logprobs", "read", "summed_norm",
    }  # fmt: skip
    old = compile_only.variants(75)
    assert {"attend", "rms_norm"} <= {v.factory for v in old} and not any("bfloat16" in v.name for v in old)
    assert "w4_matmul" not in {v.factory for v in old}


def test_a_spill_needs_a_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def found(name: str, sm: int, stack: int) -> int:
        row = {"kernel": name, "sm": sm, "registers": 255, "stack_bytes": stack, "spill_bytes": 5 * stack}
        monkeypatch.setattr(compile_only, "run", lambda *_: ([row], []))
        return kernels.main(["--compile-only", "--json"])

    assert found("rms_norm", 80, 0) == 0 and found("rms_norm", 80, 8) == 1
    known = "prefill_16_1_256_64_bfloat16_0_4_1_16_2_1_0"
    assert found(known, 80, 48) == 0 and found(known, 90, 48) == 1


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compile_only, "variants", lambda sm: [Variant("engine.cuda.ceilings", "none_of_this")])
    assert kernels.main(["--compile-only", "--sm", "90", "--json"]) == 1
    printed = capsys.readouterr()
    assert "none_of_this, sm_90: AttributeError" in printed.err and json.loads(printed.out.strip().splitlines()[-1])["kernels"] == []


def test_a_card_that_is_not_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cuda"]) == 2
    assert "bench.kernels: " in capsys.readouterr().err


def test_the_cpu_operations_are_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import kernels_cpu

    monkeypatch.setattr(kernels_cpu, "ROWS", (2,))
    monkeypatch.setattr(
        kernels_cpu,
        "SPEC",
        kernels_cpu.SPEC.__class__("llama", 512, 576, 1536, 2, 9, 3, 64, 1e-5, 2048, kernels_cpu.SPEC.rope, tie_word_embeddings=True),
    )
    assert kernels.main(["--device", "cpu", "--only", "small", "--repeats", "2", "--threads", "1", "--json"]) == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {row["op"] for row in out["rows"]} == {"norm", "silu_mul", "embed", "rope_store", "attention"}
    assert all(row["us"] > 0 and (row["error"] is None or row["error"] < 2e-2) for row in out["rows"]) and out["read_gb_s"] > 0


def test_a_graph_holds_as_many_calls_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up clock: a call takes 10 us, a replay 5 us more."""
    clock, graphs = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    class Device:
        synchronize = staticmethod(lambda: None)
        graph_pool = staticmethod(lambda: "pool")

        @staticmethod
        def capture(work, pool):  # type: ignore[no-untyped-def]
            before = len(calls)
            work()
            graphs.append(len(calls) - before)

            def replay(number: int = graphs[-1]) -> None:
                clock[0] += 5e-6 + 10e-6 * number

            return None, replay

    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    seconds = GraphTimer(Device(), 5).seconds([lambda i=i: calls.append(i) for i in range(4)])
    assert graphs == [4, 4 * round(1e-3 / 45e-6)] and seconds == pytest.approx(10e-6 + 5e-6 / graphs[1])
    assert calls[:8] == [0, 1, 2, 3, 0, 1, 2, 3]
