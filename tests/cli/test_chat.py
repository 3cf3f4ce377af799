"""The terminal chat: typed on a terminal and piped in, in process and over HTTP, and everything that ends it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.harness import Running, mock_config, serving, until
from tests.cli.programs import NUMBATCH, Terminal, run

PROMPT = "double enter to end input >>>"  # prompt_toolkit writes the space behind it as a move of the cursor
MOCK = ("chat", "--device", "mock", "--set", "cache.num_blocks=256", "--set", "engine.session_len=2048")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(mock_config(engine={"mock_step_s": 0.02, "session_len": 4096})) as running:
        yield running


def answers(said: str) -> list[str]:
    """What stands between the prompts."""
    return [part.strip() for part in said.split(PROMPT)[1:]]


def test_piped_questions_are_answered_in_turn() -> None:
    done = run(*MOCK, "--max-tokens", "6", stdin="one\nstill one\n\n\n\ntwo\n\n")
    assert done.returncode == 0, done.stderr
    first, second, last = answers(done.stdout)
    assert first
    assert second
    assert first != second
    assert last == ""
    assert "--device mock" in done.stderr
    assert "engine.device" in done.stderr
    # a last question without an empty line behind it is a question too
    assert answers(run(*MOCK, "--max-tokens", "6", stdin="one\nstill one").stdout)[0] == first


def test_the_conversation_goes_on_until_end(server: Running) -> None:
    done = run("chat", "--url", server.url, "--max-tokens", "6", stdin="a\n\nb\n\nend\n\na\n\nb\n\nexit\n\nnever\n\n")
    a, b, began, again, b_again, left = answers(done.stdout)
    assert (a, b) == (again, b_again)
    assert began == "(a new conversation)"
    assert left == ""
    assert run("chat", "--url", server.url, "--max-tokens", "6", stdin="b\n\n").stdout.count(b) == 0  # it had a history


def test_both_ways_say_the_same(server: Running) -> None:
    words = ("--max-tokens", "8", "--system", "Be brief.", "--temperature", "0.9", "--seed", "11")
    over_http = run("serve", "api_client", server.url, *words, stdin="hello\n\n")
    in_process = run(*MOCK, *words, "--top-k", "1", stdin="hello\n\n")
    assert over_http.returncode == in_process.returncode == 0
    with_top_k = run("serve", "api_client", server.url, *words, "--top-k", "1", stdin="hello\n\n")
    assert answers(with_top_k.stdout) == answers(in_process.stdout)
    assert answers(over_http.stdout)[0]


def test_the_server_may_keep_the_conversation(server: Running) -> None:
    words = ("--max-tokens", "6", "--system", "Be brief.")
    stateless = run("serve", "api_client", server.url, *words, stdin="a\n\nb\n\nend\n\na\n\n")
    kept = run("serve", "api_client", server.url, "--session-id", "77", *words, stdin="a\n\nb\n\nend\n\na\n\n")
    assert kept.returncode == 0, kept.stderr
    assert answers(kept.stdout) == answers(stateless.stdout)
    assert server.call(lambda: server.service.sessions.get("", 77)) is None, "the chat left its session behind"


def test_a_chat_over_kserve(server: Running) -> None:
    address = server.url.removeprefix("http://")
    done = run("serve", "triton_client", address, "--max-tokens", "6", stdin="a\n\nb\n\nend\n\na\n\nexit\n\n")
    assert done.returncode == 0, done.stderr
    a, b, _, again, left = answers(done.stdout)
    assert a == again
    assert b not in ("", a)
    assert left == ""
    status, continued = server.post("/v1/completions", {"prompt": f"a{a}b", "max_tokens": 6, "temperature": 0})
    assert status == 200
    assert continued["choices"][0]["text"].strip() == b
    marked = run("serve", "triton_client", address, "--chat-template", "qwen-7b", "--max-tokens", "6", stdin="a\n\n")
    assert answers(marked.stdout)[0] not in ("", a)
    missing = run("serve", "triton_client", address, "--model-name", "other", stdin="a\n\n")
    assert "There is no model" in missing.stderr


def test_a_refused_question_leaves_the_chat_open(server: Running) -> None:
    done = run("chat", "--url", server.url, "--max-tokens", "4", stdin=f"{'x' * 9000}\n\nshort\n\n")
    assert done.returncode == 0
    assert "at most 4096 tokens" in done.stderr
    assert answers(done.stdout)[1]


def test_a_server_that_is_not_there() -> None:
    done = run("serve", "api_client", "http://127.0.0.1:9", stdin="hello\n\n")
    assert done.returncode == 1
    assert "Nobody answers at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("chat",), "name a model"),
        (("chat", "m", "--url", "http://x"), "either a model or --url"),
        (("chat", "m", "--server-port", "1"), "is about serving over a port"),
        (("chat", "m", "--session-id", "1"), "a terminal is one session"),
        (("chat", "--device", "mock", "--tp", "0"), "--tp (engine.tp): must be between"),
    ],
)
def test_wrong_usage_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Nothing"]}))
    done = run("chat", str(tmp_path))
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_typed_on_a_terminal(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    with Terminal([*NUMBATCH, *MOCK, "--max-tokens", "12", "--history", str(lines)]) as terminal:
        terminal.until(PROMPT)
        terminal.type("hello\r")
        terminal.until("hello")
        terminal.type("world\r\r")
        terminal.until("world")
        terminal.type("end\r\r")  # perhaps while the answer is being written
        terminal.until("(a new conversation)")
        terminal.until(PROMPT)
        terminal.type("\x1b[A")  # what was typed before
        terminal.until("end")
        terminal.type("\x1b[A")  # and before that
        terminal.until("world")
        terminal.type("\x03")  # Ctrl-C with nothing running leaves
        assert terminal.ends() == 0
    assert "+hello" in lines.read_text()


def test_interrupting_an_answer_keeps_the_chat(server: Running) -> None:
    with Terminal([*NUMBATCH, "serve", "api_client", server.url, "--max-tokens", "3000"]) as terminal:
        terminal.until(PROMPT)
        terminal.type("tell me everything\r\r")
        until(lambda: bool(server.service.live), 20, "the answer did not begin")
        terminal.type("\x03")
        terminal.until("(stopped)")
        until(lambda: not server.service.live, 20, "the answer goes on")
        terminal.until(PROMPT)
        terminal.type("\x04")  # Ctrl-D
        assert terminal.ends() == 0


def test_control_characters_of_a_model_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from cli.terminal import converse

    class Rude:
        def reply(self, text: str) -> Iterator[str]:
            yield "a\x1b[2Jb\x07\tc\x9bd\r\ne"

        def forget(self) -> None:
            raise AssertionError("nobody asked")

    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n\n"))
    assert converse(Rude()) == 0
    assert "a[2Jb\tcd\ne\n" in capsys.readouterr().out


def test_a_real_model_in_a_terminal(smollm2: Path) -> None:
    with Terminal(
        [*NUMBATCH, "chat", str(smollm2), "--device", "cpu", "--session-len", "512", "--max-tokens", "12", "--dtype", "float32"]
    ) as terminal:
        terminal.until(PROMPT)
        terminal.type("What is the capital of France?\r\r")
        terminal.until("Paris")
        terminal.until(PROMPT)
        terminal.type("exit\r\r")
        assert terminal.ends() == 0


def test_a_session_whose_server_is_gone_ends_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    from api.remote import APIClient
    from cli.chat import parser
    from cli.partners import InSession

    with serving(mock_config()) as server, APIClient(server.url) as client:
        with InSession(client, parser().parse_args(["--url", server.url, "--max-tokens", "4"]), 5) as partner:
            assert "".join(partner.reply("hello"))
            server.call(server.listener.stop_accepting)
            client._http.close()
            client._http = APIClient("http://127.0.0.1:9")._http
    assert "session 5 was not ended: Nobody answers" in capsys.readouterr().err
