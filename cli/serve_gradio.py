"""`numbatch serve gradio URL` (or MODEL): a chat page in the browser, made with gradio, before a server's HTTP port.

Before a model the server is started first, as a child that only this page can call. The page itself knows no engine:
it is `api/remote.py`'s client with buttons. gradio comes with the extra `web`, and asks nobody outside this machine.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

from api.remote import APIClient, RunningServer
from cli.arguments import Parser, UsageError, say
from cli.flags import CACHE, ENGINE, MODEL, add_flags, configuration, refused
from config.checks import is_loopback

SECTIONS = (MODEL, ENGINE, CACHE)
PAGE_PORT = 6006
SHOWN_EVERY_S = 0.05  # a page that is told every token redraws more than it shows
MOST_ANSWERS = 64  # at a time, of all browsers
MAX_TOKENS = 4096  # end of the slider where the server does not say how long its context is
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
QUIET_HEAD = '<link rel="icon" href="data:,">'

Messages = list[dict[str, Any]]


def parser() -> Parser:
    pages_own = {name: text for name, text in refused(SECTIONS).items() if name not in ("--server-name", "--server-port")}
    cli = Parser(
        prog="numbatch serve gradio",
        usage="numbatch serve gradio URL|MODEL [flags]",
        description="A chat page in the browser, before a server (URL) or a model of this machine.",
        refused=pages_own,
    )
    cli.add_argument(
        "model_path_or_server", help="http://host:port of a server, or a Hugging Face folder, GGUF file, workspace or hub name"
    )
    page = cli.add_argument_group("page")
    page.add_argument("--server-name", default="127.0.0.1", metavar="HOST", help="address of the page (default: %(default)s)")
    page.add_argument("--server-port", type=int, default=PAGE_PORT, metavar="PORT", help="port of the page (default: %(default)s)")
    page.add_argument("--api-key", metavar="KEY", help="before a server: one of its keys (or NUMBATCH_API_KEY)")
    page.add_argument("--restful-api", nargs="?", const="True", choices=("True", "False"), metavar="True|False",
                      help="of older LMDeploy; the page always talks HTTP, so False is refused")  # fmt: skip
    add_flags(cli, SECTIONS)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.restful_api == "False":
        raise UsageError("--restful-api False: the page always talks to a server over HTTP; leave it out.")
    gradio = _gradio()
    try:
        with _client(args) as client:
            return _serve(gradio, client, args.server_name, args.server_port)
    except (ValueError, RuntimeError, ConnectionError) as error:
        if isinstance(error, UsageError):
            raise
        say(f"numbatch: {error}")
        return 1


def _gradio() -> ModuleType:
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        raise UsageError(f"the page needs the extra `web` ({error.name} is missing): pip install 'numbatch[web]'.") from None


def _client(args: Any) -> APIClient:
    """Of the server that is named, or of one that is started for the model that is named."""
    place = str(args.model_path_or_server)
    if "://" in place or (":" in place and not Path(place).exists()):
        client = APIClient(place, args.api_key or os.environ.get("NUMBATCH_API_KEY"))
        client.get("/v1/models")  # says who is not there, or that the key is not known
        return client
    asked = configuration(args, model_path=place)
    for line in asked.lines:
        say(line)
    config = asked.loaded.config
    own = dataclasses.replace(config.server, server_name="127.0.0.1", server_port=0, api_keys=(secrets.token_urlsafe(32),), ssl_certfile="")
    return RunningServer(dataclasses.replace(config, server=own))


def _serve(gradio: ModuleType, client: APIClient, host: str, port: int) -> int:
    """Until Ctrl-C."""
    page = build(gradio, client)
    if not is_loopback(host):
        say("the page asks for no password: everybody who reaches this machine can use it")
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False, enable_monitoring=False,
            footer_links=[], theme=_theme(gradio), head=QUIET_HEAD, show_error=True,
        )  # fmt: skip
    except OSError as error:
        raise RuntimeError(f"The page cannot listen on {host}:{port}: {error}") from None
    say(f"a page for {client.url}: http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port} (Ctrl-C ends it)")
    try:
        page.block_thread()
    finally:
        page.close()
    return 0


def _theme(gradio: ModuleType) -> Any:
    """gradio's plain one with the machine's own fonts: nothing is loaded from elsewhere."""
    return gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Talks:
    """The answers that run, by browser: so that Stop finds its own."""

    def __init__(self, client: APIClient) -> None:
        self._client = client
        self._running: dict[str, tuple[str, threading.Event]] = {}

    def answer(self, browser: str, messages: Messages, fields: dict[str, Any]) -> Iterator[str]:
        """The answer so far, again and again; ends early where `stop` is called."""
        name, stopped = f"page-{secrets.token_hex(8)}", threading.Event()
        self.stop(browser)
        self._running[browser] = (name, stopped)
        said, shown_s = "", 0.0
        try:
            with closing(self._client.chat(messages, request_id=name, **fields)) as pieces:  # type: ignore[type-var]  # a generator
                for piece in pieces:
                    said += piece
                    if (now := time.monotonic()) - shown_s >= SHOWN_EVERY_S:
                        shown_s = now
                        yield said
                    if stopped.is_set():
                        break
            yield said
        finally:
            if self._running.get(browser) == (name, stopped):
                del self._running[browser]

    def stop(self, browser: str) -> None:
        """What is there stays; the server is told, in case nothing comes for a while."""
        name, stopped = self._running.get(browser, ("", None))
        if stopped is not None:
            stopped.set()
            self._client.post("/abort_request", {"rid": name})


def plain(history: Messages) -> Messages:
    """gradio's messages as the API takes them: their text, without what gradio adds."""
    return [{"role": message["role"], "content": _text(message["content"])} for message in history]


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)


def to_answer(history: Messages) -> Messages:
    """The conversation without the answers at its end."""
    last = max((i for i, message in enumerate(history) if message["role"] == "user"), default=-1)
    return history[: last + 1]


def build(gradio: ModuleType, client: APIClient) -> Any:
    """The page (a `gradio.Blocks`) for what `client` serves."""
    talks = Talks(client)
    info = client.get("/server_info")
    longest = int(info.get("session_len", MAX_TOKENS))

    def said(text: str | None, history: Messages) -> tuple[str | None, Messages]:
        return ("", [*history, {"role": "user", "content": text}]) if (text or "").strip() else (text, history)

    def answer(history: Messages, system: str | None, temperature: float, top_p: float, top_k: int, penalty: float, max_tokens: int,
               request: Any) -> Iterator[Messages]:  # fmt: skip
        asked = plain(to_answer(history))
        if not asked:
            return
        opening: Messages = [{"role": "system", "content": system}] if (system or "").strip() else []
        fields = {
            "temperature": float(temperature), "top_p": float(top_p), "top_k": int(top_k), "repetition_penalty": float(penalty),
            "max_tokens": int(max_tokens) or None,
        }  # fmt: skip
        try:
            for text in talks.answer(str(request.session_hash), opening + asked, fields):
                yield [*asked, {"role": "assistant", "content": text}]
        except (ValueError, RuntimeError, ConnectionError) as error:
            raise gradio.Error(str(error)) from None

    def stop(request: Any) -> None:
        try:
            talks.stop(str(request.session_hash))
        except (ValueError, RuntimeError, ConnectionError) as error:
            raise gradio.Error(str(error)) from None

    for handler in (answer, stop):
        handler.__annotations__["request"] = gradio.Request  # how gradio knows what to pass
    with gradio.Blocks(title=f"{info['model']} · numbatch", analytics_enabled=False, fill_height=True) as page:
        gradio.Markdown(f"## {_escaped(str(info['model']))}")
        chat = gradio.Chatbot(
            elem_id="chat",
            show_label=False,
            scale=1,
            allow_tags=False,
            feedback_options=None,
            buttons=["copy"],
            placeholder="Ask something.",
        )
        text = gradio.Textbox(elem_id="text", show_label=False, placeholder="Message", autofocus=True, lines=1, max_lines=8)
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", elem_id="send", min_width=90)
            halt = gradio.Button("Stop", elem_id="stop", min_width=90)
            again = gradio.Button("Regenerate", elem_id="again", min_width=90)
            clear = gradio.Button("Clear", elem_id="clear", min_width=90)
        with gradio.Accordion("Sampling and system prompt", open=False, elem_id="sampling"):
            controls = [
                gradio.Textbox(value="", label="System prompt", lines=2, elem_id="system"),
                gradio.Slider(0, 2, value=0.7, step=0.05, label="Temperature"),
                gradio.Slider(0, 1, value=0.95, step=0.01, label="Top p"),
                gradio.Slider(0, 200, value=0, step=1, label="Top k (0: off)"),
                gradio.Slider(0.5, 2, value=1, step=0.01, label="Repetition penalty"),
                gradio.Slider(0, longest - 1, value=0, step=1, label="Longest answer in tokens (0: what fits)"),
            ]
        gradio.on([send.click, text.submit], said, [text, chat], [text, chat], queue=False).then(answer, [chat, *controls], chat)
        again.click(to_answer, chat, chat, queue=False).then(answer, [chat, *controls], chat)
        halt.click(stop, queue=False)
        clear.click(stop, queue=False).then(list, None, chat, queue=False)
        page.unload(stop)
    page.queue(default_concurrency_limit=MOST_ANSWERS)
    return page


def _escaped(text: str) -> str:
    """A model's name is no Markdown."""
    return "".join(c if c.isalnum() or c in " .-/" else f"&#{ord(c)};" for c in text)
