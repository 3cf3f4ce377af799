"""The in-process benchmarks on the mock engine: that they measure what they say, and their last line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bench import compare_llamacpp, delivery, offline, served
from bench.llamacpp import spread
from bench.machine import Neighbours, describe_machine
from bench.metrics import steady_rate
from bench.readers import Stream
from bench.workload import mixed_lengths


def test_steady_rate_counts_only_while_all_run() -> None:
    one = [0.0, 1.0, 2.0, 3.0, 4.0]
    late = [1.5, 2.5, 3.5, 4.5, 5.5]
    assert steady_rate([one]) == 1.0
    assert steady_rate([one, late]) == 5 / 2.5  # from 1.5 to 4: three tokens of the first, two of the second
    with pytest.raises(ValueError, match="2 sequences never ran"):
        steady_rate([[0.0, 1.0], [1.0, 2.0]])


def test_messages_that_were_held_back_are_spread() -> None:
    assert spread([0.0, 1.0, 2.0], 3) == [0.0, 1.0, 2.0]
    assert spread([0.0, 3.0], 4) == [0.0, 1.0, 2.0, 3.0]
    assert len(spread([0.0, 1.0, 4.0], 8)) == 8
    assert spread([2.0], 1) == [2.0]


def test_offline_on_the_mock_engine(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        "",
        "--device",
        "mock",
        "--tokens",
        "20",
        "--repeats",
        "2",
        "--batch",
        "1,4",
        "--set",
        "engine.mock_step_s=0.01",
        "--json",
    ]
    assert offline.main(words) == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    # a step of 10 ms gives each of the sequences one token
    assert 20 < out["decode_tok_s"]["1"] <= 101 and 60 < out["decode_tok_s"]["4"] <= 404
    assert 0 < out["prompt_tok_s"] < 512 / 0.01
    assert len(out["runs"]["decode"]["4"]) == 2 and len(out["runs"]["prompt"]) == 6


MOCK = ["--model", "", "--device", "mock", "--set", "engine.mock_step_s=0.005", "--json"]


def test_offline_measures_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--decode",
        "2",
        "--prefill",
        "3x32,1x64",
        "--workload",
        "mixed512",
        "--requests",
        "6",
        "--length-scale",
        "0.05",
        "--tokens",
        "8",
    ]
    assert offline.main([*MOCK, *words, "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    out = json.loads(printed.strip().splitlines()[-1])
    assert "prompt_tok_s" not in out and set(out["decode_tok_s"]) == {"2"} and set(out["prefill_tok_s"]) == {"3x32", "1x64"}
    assert 0 < out["prefill_tok_s"]["3x32"] <= 96 / 0.005
    mixed = out["mixed"]
    wanted = sum(max(1, round(m * 0.05)) for _, m in mixed_lengths(6))
    assert mixed["completed"] == 6 and mixed["total_output_tokens"] == wanted and mixed["steps"] > 0
    assert mixed["output_throughput"] == pytest.approx(wanted / mixed["duration"])
    assert "mixed x 6" in printed and "ttfts" not in mixed


def test_offline_default_is_a_prompt_and_decoding() -> None:
    args = offline.parser().parse_args(["--model", "x"])
    assert offline.work_of(args).prompt and offline.work_of(args).batches == (1, 8, 16)
    only = offline.work_of(offline.parser().parse_args(["--model", "x", "--workload", "mixed512"]))
    assert not only.prompt and only.batches == () and only.mixed == only.most_sequences == 512


def test_served_counts_from_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "mock", "--workload", "mixed512", "--requests", "9", "--length-scale", "0.05", "--vocab-size", "250", "--cold"]
    assert served.main([*words, "--json"]) == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert out["ready_s"] > 0.2 and out["cold"] is True
    assert out["mixed_http"]["total_output_tokens"] == sum(max(1, round(m * 0.05)) for _, m in mixed_lengths(9))


def test_served_says_why_a_server_did_not_come(capfd: pytest.CaptureFixture[str], smollm2: Path) -> None:
    assert served.main(["--model", "nowhere.gguf", "--device", "cpu"]) == 2
    assert "nowhere.gguf" in capfd.readouterr().err
    words = ["--model", str(smollm2), "--device", "cpu", "--ready-timeout", "60", "--set", "cache.num_blocks=100000000"]
    assert served.main(words) == 2
    assert "exit code 4 before it was ready" in capfd.readouterr().err


def test_offline_refuses_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert offline.main(["--model", "nowhere.gguf", "--batch", "1"]) == 2
    assert "bench.offline: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        offline.main(["--model", "x", "--batch", "0"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be chosen on Linux only")
def test_delivery_counts_what_arrives(capsys: pytest.CaptureFixture[str]) -> None:
    cores = os.sched_getaffinity(0)
    assert delivery.main(["--streams", "5", "--seconds", "0.5", "--repeats", "1", "--step-s", "0.02", "--json"]) == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 5 < out["token_events_per_s"] <= 5 / 0.02 * 1.1  # 5 streams, at most an event each 20 ms
    assert 0 <= out["stream_max"] - out["stream_min"] <= 2 and out["stream_min"] > 0
    assert out["events"] == pytest.approx(5 * out["stream_min"], abs=10)
    assert os.sched_getaffinity(0) == cores


def test_readers_see_events_cut_anywhere() -> None:
    class Pieces:
        def __init__(self, pieces: list[bytes]) -> None:
            self.pieces = pieces

        def recv(self, _: int) -> bytes:
            return self.pieces.pop(0) if self.pieces else b""

    def count(pieces: list[bytes]) -> int:
        stream = Stream.__new__(Stream)
        stream.socket, stream.events, stream.head, stream.tail = Pieces(pieces), 0, b"", b""  # type: ignore[assignment]
        while stream.read():
            pass
        return stream.events

    body = b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n10\r\ndata: {}\n\n\r\n20\r\ndata: {}\n\ndata: {}\n\n\r\n"
    for size in (1, 2, 3, 5, 1000):
        assert count([body[i : i + size] for i in range(0, len(body), size)]) == 3
    with pytest.raises(ValueError, match="503"):
        count([b"HTTP/1.1 503 Service Unavailable\r\n\r\n"])


def test_machine_says_features_and_neighbours() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1 and set(machine["features"]) >= {"avx512_bf16", "avx512_vnni"}
    assert str(Path.home()) not in json.dumps(machine)
    neighbours = Neighbours()
    sum(i * i for i in range(300_000))  # one's own work is nobody else's
    assert 0.0 <= neighbours.share() <= 1.0


def test_requantized_copy_keeps_everything_but_the_format(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    weights, norm = rng.normal(size=(4, 64)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(7)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tensor("w", gguf.quants.quantize(weights, kinds.Q4_1), raw_dtype=kinds.Q4_1)
    writer.add_tensor("norm", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare_llamacpp.requantize(source, target)
    reader = gguf.GGUFReader(target)
    assert reader.fields["llama.block_count"].contents() == 7
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0.value
    by_name = {t.name: t for t in reader.tensors}
    assert by_name["w"].tensor_type == kinds.Q4_0 and by_name["norm"].tensor_type == kinds.F32
    got = gguf.quants.dequantize(by_name["w"].data, kinds.Q4_0)
    assert np.abs(got - weights).max() < 0.3 and np.array_equal(by_name["norm"].data, norm)


def test_compare_takes_medians_and_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peer, ours = iter([100.0, 300.0, 200.0]), iter([250.0, 1000.0, 500.0])
    monkeypatch.setattr(compare_llamacpp, "llamacpp_round", lambda *_: dict.fromkeys(compare_llamacpp.CELLS, next(peer)))
    monkeypatch.setattr(compare_llamacpp, "numbatch_round", lambda *_: dict.fromkeys(compare_llamacpp.CELLS, next(ours)))
    model = tmp_path / "m.gguf"
    model.touch()
    assert compare_llamacpp.main(["--model", str(model), "--json"]) == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert out["ratios"] == {"prompt_512": 2.5, "decode_1": 2.5, "decode_8": 2.5, "decode_16": 2.5, "http_8": 2.5}
    assert out["llamacpp"]["decode_8"] == 200 and out["numbatch"]["http_8"] == 500 and len(out["runs"]["numbatch"]) == 3
    assert "avx512_bf16" in out["cpu"] and out["model"] == "m.gguf"
    with pytest.raises(SystemExit):
        compare_llamacpp.main(["--model", str(tmp_path / "none.gguf")])
