"""The Triton scripts of a workspace, run against a numbatch that answers: text to ids, ids to ids, ids to text."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.triton_glue import write_glue
from tests.api.harness import serving


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: Exception | None = None) -> None:
        self.outputs = {t.name: t.array for t in output_tensors or []}
        self.error = error


class Request:
    """A request of Triton's; the sender keeps what it is given."""

    def __init__(self, **inputs: np.ndarray) -> None:
        self.inputs = inputs
        self.sent: list[Any] = []

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        self.sent.append(response if response is not None else flags)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace's glue, Triton's module in its place, and a mock engine behind NUMBATCH_URL."""
    stub = types.ModuleType("triton_python_backend_utils")
    stub.Tensor, stub.InferenceResponse, stub.TritonError = Tensor, Response, RuntimeError  # type: ignore[attr-defined]
    stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    stub.get_input_tensor_by_name = lambda r, name: Tensor(name, r.inputs[name]) if name in r.inputs else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    write_glue(tmp_path)
    with serving() as running:
        monkeypatch.setenv("NUMBATCH_URL", f"http://127.0.0.1:{running.port}")
        yield tmp_path / "model_repository"


def model(repository: Path, name: str) -> Any:
    path = repository / name / "1" / "model.py"
    spec = importlib.util.spec_from_file_location(f"{name}_of_triton", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()


def test_text_to_ids_to_ids_to_text(scripts: Path) -> None:
    query = Request(QUERY=np.array([[b"hello"]], object))
    [tokenized] = model(scripts, "preprocessing").execute([query])
    assert tokenized.error is None and tokenized.outputs["INPUT_ID"].dtype == np.int32
    ids, length = tokenized.outputs["INPUT_ID"], tokenized.outputs["REQUEST_INPUT_LEN"]
    assert length.tolist() == [[ids.shape[1]]]

    wanted = {
        "request_output_len": np.array([[5]], np.uint32),
        "temperature": np.array([0.0], np.float32),
        "random_seed": np.array([7], np.uint64),
    }
    request = Request(input_ids=ids.astype(np.uint32), input_lengths=length, **wanted)
    assert model(scripts, "turbomind").execute([request]) is None
    *answers, final = request.sent
    assert final == 1 and all(answer.error is None for answer in answers)
    lengths = [int(answer.outputs["sequence_length"][0, 0]) for answer in answers]
    assert lengths == sorted(set(lengths)) and 1 <= lengths[-1] <= 5
    for before, after in zip(answers, answers[1:], strict=False):  # all ids so far, each time
        count = before.outputs["output_ids"].shape[-1]
        np.testing.assert_array_equal(after.outputs["output_ids"][..., :count], before.outputs["output_ids"])

    text = np.array([list(b"hello")], np.uint32)
    [detokenized] = model(scripts, "postprocessing").execute([Request(TOKENS_BATCH=text, sequence_length=np.array([4], np.uint32))])
    assert detokenized.outputs["OUTPUT"].tolist() == [[b"hell"]]


def test_errors_are_the_servers_sentences(scripts: Path) -> None:
    request = Request(
        input_ids=np.array([[1]], np.uint32), input_lengths=np.array([[1]], np.uint32), request_output_len=np.array([[1 << 30]], np.uint32)
    )
    model(scripts, "turbomind").execute([request])
    assert len(request.sent) == 2 and "numbatch answers 400" in str(request.sent[0].error)
    [answer] = model(scripts, "preprocessing").execute([Request()])
    assert answer.error is not None
    [answer] = model(scripts, "postprocessing").execute(
        [Request(TOKENS_BATCH=np.array([[1 << 30]], np.uint32), sequence_length=np.array([1]))]
    )
    assert "numbatch answers 400" in str(answer.error)


def test_configurations_name_what_the_scripts_read(tmp_path: Path) -> None:
    write_glue(tmp_path)
    for name in ("preprocessing", "postprocessing", "turbomind"):
        folder = tmp_path / "model_repository" / name
        config, script = (folder / "config.pbtxt").read_text(), (folder / "1" / "model.py").read_text()
        assert f'name: "{name}"' in config and 'backend: "python"' in config
        named = [line.split('"')[1] for line in config.splitlines() if line.startswith("    name:")]
        assert named and all(f'"{tensor}"' in script for tensor in named)


def test_the_docker_script_asks_for_keys(tmp_path: Path) -> None:
    write_glue(tmp_path)
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    docker.chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    refused = subprocess.run([tmp_path / "service_docker_up.sh"], env=path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "NUMBATCH_API_KEYS" in refused.stderr
    keyed = path | {"NUMBATCH_API_KEYS": "k", "GPUS": "all"}
    ran = subprocess.run([tmp_path / "service_docker_up.sh", "--tp", "2"], env=keyed, capture_output=True, text=True, check=True)
    flags = ran.stdout.split()
    assert flags[:4] == ["run", "--rm", "--gpus", "all"] and f"{tmp_path}:/workspace:ro" in flags
    at = flags.index("serve")
    assert flags[at - 1] == "numbatch" and flags[at:][:3] == ["serve", "api_server", "/workspace"] and flags[-2:] == ["--tp", "2"]
