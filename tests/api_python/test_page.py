"""The code of docs/python.md runs as it stands there, with a model that speaks bytes in the place of `path/to/model`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.harness import mock_config, serving
from tests.e2e.conftest import byte_tokenizer
from tests.fixtures.toy import toy_checkpoint

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = toy_checkpoint(tmp_path_factory.mktemp("page") / "toy", max_position_embeddings=2048)
    byte_tokenizer(path)
    return path


def run(root: Path, folder: Path, code: str) -> str:
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    env = {
        **os.environ,
        "NUMBATCH_ENGINE_DEVICE": "mock",
        "NUMBATCH_MODEL_DTYPE": "float32",
        "NUMBATCH_CACHE_CACHE_MAX_BYTES": "16000000",
    }
    env["PYTHONIOENCODING"] = "utf-8"
    done = subprocess.run([sys.executable, str(script)], cwd=root, capture_output=True, text=True, timeout=120, env=env, errors="replace")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_of_it_is_run() -> None:
    assert len(BLOCKS) == PAGE.count("```python") == 4


def test_a_model_in_this_process(root: Path, tmp_path: Path, model: Path) -> None:
    code = BLOCKS["A model in this process"].replace("path/to/model", str(model))
    code = code.replace('What is the capital of France?")', 'What is the capital of France?", GenerationConfig(max_new_tokens=8))')
    said = run(
        root,
        tmp_path,
        code.replace('pipe.chat("My', 'pipe.chat(gen_config=config, prompt="My').replace('?", session)', '?", session, config)'),
    )
    assert "length 64" in said or "stop" in said


def test_a_server_of_its_own(root: Path, tmp_path: Path, model: Path) -> None:
    said = run(root, tmp_path, BLOCKS["A server of its own"].replace("path/to/model", str(model)))
    assert "['toy']" in said


def test_a_server_that_runs(root: Path, tmp_path: Path) -> None:
    with serving(mock_config()) as server:
        said = run(root, tmp_path, BLOCKS["A server that runs"].replace("http://127.0.0.1:23333", server.url))
    assert said.startswith("['mock'] ([72, 101, 108, 108, 111], 5)")


def test_lmdeploys_first_interface(root: Path, tmp_path: Path, model: Path) -> None:
    assert run(root, tmp_path, BLOCKS["LMDeploy's first interface"].replace("path/to/model", str(model)))
