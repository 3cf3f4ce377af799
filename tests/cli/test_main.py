"""Which command is meant, how fast that is known, and what a mistyped one is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.entry import ROOMS
from cli.main import COMMANDS, SERVE, main, there
from tests.cli.programs import run


def test_the_overview_lists_every_command_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in there(COMMANDS))
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in there(SERVE))


def test_nothing_heavy_is_imported_for_help(root: Path) -> None:
    code = "import sys; from cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split("\n")[-2].split()}
    assert not loaded & {"torch", "numba", "numpy", "aiohttp", "tokenizers", "httpx", "prompt_toolkit", "argcomplete", "asyncio"}


@pytest.mark.parametrize("name", [name for name, command in there(COMMANDS).items() if not command.below])
def test_every_command_has_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("name", list(there(SERVE)))
def test_every_serving_command_has_help(name: str) -> None:
    done = run("serve", name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["chatt"], "numbatch: there is no command 'chatt'; did you mean chat?"),
        (["serve", "apiserver"], "did you mean api_server?"),
        (["lite", "auto_wq"], "did you mean auto_awq?"),
        (["bench", "offlin"], "did you mean offline?"),
        (["nothing-like-it"], "there are chat, serve, list"),
    ],
)
def test_a_mistyped_command_is_told_the_nearest(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


def test_a_command_of_lite_that_is_not_needed_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lite", "get_small_sharded_hf", "model", "--work-dir", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("numbatch lite: get_small_sharded_hf: ")
    assert len(said) > 40


def test_list_names_families_and_templates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "internlm-chat-7b", "internlm2-chat-1_8b", "qwen-7b", "llama-2"):
        assert name in said


def test_bench_runs_a_program_with_its_own_flags(root: Path) -> None:
    done = run("bench", "offline", "--help")
    assert done.returncode == 0
    assert "--" in done.stdout


def complete(line: str) -> list[str]:
    """What argcomplete answers a shell: it writes to descriptor 8."""
    script = 'exec 8>&1 1>/dev/null; exec "$0" -m cli'
    env = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, text=True, env={**os.environ, **env}, timeout=60)
    return [word.strip() for word in done.stdout.split("\n") if word.strip()]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("numbatch se", {"serve"}),
        ("numbatch serve api_", {"api_server", "api_client"}),
        ("numbatch serve api_server --cache", {"--cache-max-entry-count", "--cache-block-seq-len"}),
        ("numbatch serve api_server --log-level DEB", {"DEBUG"}),
        ("numbatch completion z", {"zsh"}),
    ],
)
def test_tab_completes(line: str, wanted: set[str]) -> None:
    assert set(complete(line)) == wanted


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_the_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "numbatch" in said
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=said, text=True).returncode == 0


def test_a_stranger_in_a_rooms_place_is_named(tmp_path: Path, root: Path) -> None:
    (tmp_path / "text.py").write_text("raise SystemError('imported')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-m", "cli", "--version"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert f"(text: {tmp_path / 'text.py'})" in done.stderr
    assert run("--version").stdout.startswith("numbatch ")


def test_the_guard_knows_every_room() -> None:
    from tests.house.tree import ROOMS as HOUSE

    assert set(ROOMS) == {*HOUSE, "server", "numbatch"} - {"cli"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serve", "path/to/model"], "numbatch serve: to serve a model, write numbatch serve api_server path/to/model"),
        (["--foo"], "numbatch: --foo: there is no such flag before a command; numbatch --help lists the commands"),
        (["serve", "api_server", "--tp"], "numbatch serve api_server: --tp needs N after it"),
        (["serve", "api_server", "x", "--api-keys"], "numbatch serve api_server: --api-keys needs KEY (one or more) after it"),
        (
            ["serve", "api_server", "x", "--dtype", "fp16"],
            "--dtype fp16: must be one of auto, bfloat16, float16, float32; did you mean float16?",
        ),
        (["chat", "x", "--temperature", "hot"], "numbatch chat: --temperature hot: must be a number"),
        (["chat", "x", "--max-tokens", "1.5"], "numbatch chat: --max-tokens 1.5: must be a whole number"),
        (["convert"], "model_name and model_path are missing; write numbatch convert MODEL_NAME MODEL_PATH [flags]"),
        (["chat"], "numbatch chat: name a model (folder, GGUF file or hub name), or a server with --url."),
        (["fetch", "llama"], "numbatch fetch: MODEL llama: must be one of smollm2"),
        (["check_env", "--foo"], "numbatch check_env: there is no flag --foo"),
        (["chat", "--url", "ftp://x"], "numbatch chat: ftp://x: is no address of a server; write http://HOST:PORT."),
        (["chat", "/no/model"], "numbatch chat: /no/model: there is no such file or folder; a name of the hub is written owner/name."),
        (["chat", "docs"], "numbatch chat: docs: this folder has no config.json; a Hugging Face model's folder has one."),
    ],
)
def test_wrong_usage_says_what_to_write(
    words: list[str], sentence: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    try:
        code = main(words)
    except SystemExit as end:
        code = int(str(end.code))
    assert code in (1, 2, 3)
    assert sentence in capsys.readouterr().err
