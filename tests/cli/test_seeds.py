"""The fifteen commands and snippets of the founding documents, run as they are written there.

Only names are replaced: `lmdeploy` by numbatch, model names by local paths, port 23333 by a free one, and the public
address of a server that is really started by 127.0.0.1 (the command as written is checked, not served). What a seed
says nothing about (the device) comes from the environment. `SEEDS` is the table that docs/seeds.md cites.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from tests.api.harness import mock_config, serving
from tests.cli.programs import NUMBATCH, ROOT, run
from tests.e2e.conftest import byte_tokenizer
from tests.e2e.support import free_port
from tests.fixtures.toy import toy_checkpoint

CPU = {"NUMBATCH_ENGINE_DEVICE": "cpu", "NUMBATCH_MODEL_DTYPE": "float32", "NUMBATCH_CACHE_CACHE_MAX_BYTES": str(64 << 20)}
REFERENCE = {**CPU, "NUMBATCH_ENGINE_DEVICE": "reference"}  # the weights count, speed does not
MOCK = {**CPU, "NUMBATCH_ENGINE_DEVICE": "mock"}  # the model's description and tokenizer count, its weights do not

# test -> the seed's own words
SEEDS = {
    "test_chat": "lmdeploy chat /path/internlm2_chat_1_8b_qlora_18000",
    "test_chat_with_half_the_cache": "lmdeploy chat /path/internlm2_chat_1_8b_qlora_18000 --cache-max-entry-count 0.5",
    "test_auto_awq": "lmdeploy lite auto_awq M --calib-dataset 'ptb' --calib-samples 128 --calib-seqlen 1024 --w-bits 4 "
    "--w-group-size 128 --work-dir D-4bit",
    "test_api_server_of_a_4_bit_model": "lmdeploy serve api_server D-4bit --model-format hf --quant-policy 0 --server-name 0.0.0.0 "
    "--server-port 23333 --tp 1",
    "test_chat_turbomind": "lmdeploy chat turbomind Qwen/Qwen-7B-Chat --model-name qwen-7b",
    "test_convert": "lmdeploy convert internlm-chat-7b /path",
    "test_chat_with_a_workspace": "lmdeploy chat turbomind ./workspace",
    "test_api_server_of_a_workspace": "lmdeploy serve api_server ./workspace --server_name 0.0.0.0 --server_port 23333 "
    "--instance_num 64 --tp 1",
    "test_api_client": "lmdeploy serve api_client http://localhost:23333",
    "test_gradio": "lmdeploy serve gradio http://0.0.0.0:23333 --server_name 0.0.0.0 --server_port 6006 --restful_api True",
    "test_turbomind_in_python": "tm.TurboMind.from_pretrained ... create_instance ... stream_infer",
    "test_infer_compare": "python infer_compare.py hf; python infer_compare.py lmdeploy",
    "test_serve_in_python": "serve('internlm/internlm2-chat-7b', chat_template_config=ChatTemplateConfig.from_json(f))",
    "test_list": "lmdeploy list",
    "test_check_env": "lmdeploy check_env",
}


def words(test: str, **replaced: str) -> list[str]:
    """The seed's words without `lmdeploy`, names replaced."""
    return [replaced.get(word, word).strip("'") for word in SEEDS[test].split()[1:]]


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -e .[web]")


def http(method: str, url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.loads(answer.read())


@contextmanager
def started(command: list[str], port: int, env: dict[str, str] = MOCK, limit_s: float = 60.0) -> Iterator[str]:
    """A server, from when its port answers until SIGTERM; it must end with code 0."""
    process = subprocess.Popen([*NUMBATCH, *command], cwd=ROOT, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + limit_s
        while not _answers(port):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 0, said
    finally:
        process.kill()
        process.communicate()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def says_something(url: str) -> None:
    (name,) = (model["id"] for model in http("GET", url + "/v1/models")["data"])
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
    assert http("POST", url + "/v1/chat/completions", body)["usage"]["completion_tokens"] == 4


def test_the_table_is_complete() -> None:
    assert len(SEEDS) == 15
    assert all(callable(globals()[name]) for name in SEEDS)


def test_chat(toy_model: Path) -> None:
    command = words("test_chat", **{"/path/internlm2_chat_1_8b_qlora_18000": str(toy_model)})
    done = run(*command, stdin="hello\n\nend\n\nexit\n\n", env=CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("double enter to end input >>>") == 3


def test_chat_with_half_the_cache(toy_model: Path) -> None:
    command = words("test_chat_with_half_the_cache", **{"/path/internlm2_chat_1_8b_qlora_18000": str(toy_model)})
    done = run(*command, stdin="exit\n\n", env=MOCK)
    assert done.returncode == 0, done.stderr
    assert "--cache-max-entry-count 0.5  cache.cache_max_entry_count = 0.5" in done.stderr


def test_auto_awq(tmp_path: Path) -> None:
    """`ptb` is a file of a local copy here, as its hub copy is of a kind that is not read."""
    model = toy_checkpoint(tmp_path / "M", hidden=128, layers=1, max_position_embeddings=2048)
    byte_tokenizer(model)
    (tmp_path / "ptb.train.txt").write_text("\n".join(f" no it was n't black monday <unk> {n} " for n in range(400)))
    replaced = {"M": str(model), "D-4bit": str(tmp_path / "D-4bit")}
    done = run(*words("test_auto_awq", **replaced), "--download-dir", str(tmp_path), env=CPU)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "D-4bit" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"


def test_api_server_of_a_4_bit_model(toy_awq: Path) -> None:
    replaced = {"D-4bit": str(toy_awq)}
    checked = run(*words("test_api_server_of_a_4_bit_model", **replaced), "--check", env=MOCK)
    assert checked.returncode == 0, checked.stderr
    port = free_port()
    local = {**replaced, "23333": str(port), "0.0.0.0": "127.0.0.1"}
    with started(words("test_api_server_of_a_4_bit_model", **local), port, CPU) as url:
        says_something(url)


def test_chat_turbomind(toy_model: Path) -> None:
    done = run(*words("test_chat_turbomind", **{"Qwen/Qwen-7B-Chat": str(toy_model)}), stdin="hello\n\nexit\n\n", env=MOCK)
    assert done.returncode == 0, done.stderr
    assert "chat turbomind MODEL is now chat MODEL" in done.stderr
    assert "model.chat_template = " in done.stderr


@pytest.fixture(scope="module")
def workspace(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `convert` made: `./workspace` in the directory it was called in."""
    needs("cli.convert")
    folder = tmp_path_factory.mktemp("converted")
    command = words("test_convert", **{"/path": str(toy_model)})
    done = subprocess.run([*NUMBATCH, *command], cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, **CPU})
    assert done.returncode == 0, done.stderr
    return folder / "workspace"


def test_convert(workspace: Path) -> None:
    weights = workspace / "triton_models" / "weights"
    assert "tensor_para_size = 1" in (weights / "config.ini").read_text()
    assert (weights / "tok_embeddings.weight").is_file()


def test_chat_with_a_workspace(workspace: Path) -> None:
    done = run(*words("test_chat_with_a_workspace", **{"./workspace": str(workspace)}), stdin="hello\n\nexit\n\n", env=REFERENCE)
    assert done.returncode == 0, done.stderr


def test_old_spellings_of_the_server(toy_model: Path) -> None:
    """The command of `test_api_server_of_a_workspace` as it is written, public address included; nothing is served."""
    command = words("test_api_server_of_a_workspace", **{"./workspace": str(toy_model)})
    checked = run(*command, "--check", env=MOCK)
    assert checked.returncode == 0, checked.stderr
    for line in ("--server_name is now --server-name", "--instance_num is now --max-batch-size", "engine.max_batch_size = 64"):
        assert line in checked.stderr
    assert 'server.server_name = "0.0.0.0"' in checked.stderr


def test_every_flag_of_the_first_seed_at_once(
    toy_awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seed 000's list for `serve api_server`; --adapters, the one that is not there yet, is refused by its name."""
    groups = {name: [{"id": "default", "quota_pct": 100}] for name in ("Platinum", "Gold", "Silver", "Bronze")}
    (tmp_path / "qos.json").write_text(json.dumps({"enable_user_qos": True, "user_groups": list(groups), "user_group_map": groups}))
    for name in ("SSL_KEYFILE", "SSL_CERTFILE"):
        (tmp_path / name).write_text("")
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NUMBATCH_ENGINE_KERNEL_CACHE_DIR", str(tmp_path))  # where the template's file goes
    flags = f"""--server-name 0.0.0.0 --server-port 23333 --allow-origins https://a.example --allow-credentials --allow-methods GET POST
        --allow-headers X-A --qos-config-path {tmp_path}/qos.json --backend turbomind --log-level ERROR --api-keys k1 k2 --ssl
        --chat-template internlm2 --meta-instruction Short. --cap chat --tp 1 --model-name m --session-len 64 --max-batch-size 128
        --cache-max-entry-count 0.8 --cache-block-seq-len 64 --model-format awq --quant-policy 0 --rope-scaling-factor 0.0"""
    command = ["serve", "api_server", str(toy_awq), *flags.split()]
    assert main([*command, "--print-effective"]) == 0
    said = capsys.readouterr()
    effective = tomllib.loads(said.out)
    assert (effective["engine"]["max_batch_size"], effective["model"]["model_name"], effective["server"]["insecure"]) == (128, "m", False)
    assert "Short." in Path(effective["model"]["chat_template"]).read_text()
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--adapters", "mylora=/path"])
    assert "--adapters: LoRA adapters come in a later version" in capsys.readouterr().err


def test_api_server_of_a_workspace(workspace: Path) -> None:
    port = free_port()
    local = {"./workspace": str(workspace), "23333": str(port), "0.0.0.0": "127.0.0.1"}
    with started(words("test_api_server_of_a_workspace", **local), port, REFERENCE) as url:
        says_something(url)


def test_api_client() -> None:
    with serving(mock_config()) as server:
        command = words("test_api_client", **{"http://localhost:23333": server.url.replace("127.0.0.1", "localhost")})
        done = run(*command, "--max-tokens", "5", stdin="hello\n\nend\n\nexit\n\n")
    assert done.returncode == 0, done.stderr
    assert "(a new conversation)" in done.stdout


def test_gradio() -> None:
    needs("cli.serve_gradio")
    needs("gradio")
    port = free_port()
    with serving(mock_config()) as server:
        replaced = {"http://0.0.0.0:23333": server.url, "0.0.0.0": "127.0.0.1", "6006": str(port)}
        page = subprocess.Popen([*NUMBATCH, *words("test_gradio", **replaced)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            end = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert page.poll() is None, page.communicate()[1]
                assert time.monotonic() < end
                time.sleep(0.1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                assert b"gradio" in answer.read().lower()
        finally:
            page.kill()
            page.communicate()


TURBOMIND = """
from numbatch import turbomind as tm
model_path = {path!r}
tm_model = tm.TurboMind.from_pretrained(model_path, model_name='internlm-chat-20b')
generator = tm_model.create_instance()
query = "你好啊兄嘚"
prompt = tm_model.model.get_prompt(query)
input_ids = tm_model.tokenizer.encode(prompt)
for outputs in generator.stream_infer(
        session_id=0,
        input_ids=[input_ids]):
    res, tokens = outputs[0]
response = tm_model.tokenizer.decode(res.tolist())
print(response)
print(prompt, tokens == len(res))
"""


def python(source: str, *arguments: str, folder: Path, env: dict[str, str] = MOCK) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(source, encoding="utf-8")
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def test_turbomind_in_python(toy_model: Path, tmp_path: Path) -> None:
    done = python(TURBOMIND.format(path=str(toy_model)), folder=tmp_path, env=REFERENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("<|User|>:你好啊兄嘚\n<|Bot|>: True")


def test_infer_compare(toy_model: Path) -> None:
    for engine, printed in (("lmdeploy", "numbatch"), ("hf", "hf")):
        if engine == "hf" and importlib.util.find_spec("transformers") is None:
            continue  # transformers is needed for its own half only
        command = [sys.executable, "examples/infer_compare.py", engine, "--model", str(toy_model), "--max-tokens", "8", "--rounds", "1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **CPU})
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{printed} 耗时 ")
        assert done.stdout.rstrip().endswith(" 字/秒")


SERVE = """
from numbatch import ChatTemplateConfig, serve
json_file = {template!r}
client = serve({path!r},
               chat_template_config=ChatTemplateConfig.from_json(json_file), server_port=0)
for item in client.chat_completions_v1(model=client.available_models[0], messages='hi', max_tokens=4, ignore_eos=True):
    print(item['usage']['prompt_tokens'], item['usage']['completion_tokens'])
client.close()
"""
TEMPLATE = {
    "model_name": "your awesome chat template name",
    "system": "<|im_start|>system\n",
    "meta_instruction": "You are a robot developed by LMDeploy.",
    "eosys": "<|im_end|>\n",
    "user": "<|im_start|>user\n",
    "eoh": "<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "eoa": "<|im_end|>",
    "separator": "\n",
    "capability": "chat",
    "stop_words": ["<|im_end|>"],
}


def test_serve_in_python(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text(json.dumps(TEMPLATE))
    done = python(SERVE.format(path=str(toy_model), template=str(tmp_path / "template.json")), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = f"system\n{TEMPLATE['meta_instruction']}\nuser\nhi\nassistant\n"
    assert done.stdout.split() == [str(len(text) + 5), "4"]  # one token a byte and one for each of five markers


def test_list() -> None:
    done = run(*words("test_list"))
    assert done.returncode == 0
    assert "internlm-chat-7b" in done.stdout


def test_check_env() -> None:
    done = run(*words("test_check_env"), env=CPU)
    assert done.returncode == 0, done.stderr
    assert "numbatch" in done.stdout
    assert "OK: numbatch can run on the CPU" in done.stdout
