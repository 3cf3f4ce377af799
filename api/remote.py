"""The Python client of a server, and a server in a process of its own that comes with its client.

Method names and arguments are those of LMDeploy's APIClient; httpx does the HTTP. A refusal is a `ValueError`, a
failure a `RuntimeError`, a server that does not answer a `ConnectionError`, each with the server's own sentence.
Knows no engine.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from config.checks import is_loopback
from config.errors import ConfigError
from config.load import ENV_PREFIX, all_knobs, toml_value
from config.schema import Config

CONNECT_S = 10.0
POLL_S = 0.1
STOP_S = 10.0  # beyond the server's own drain
ENDINGS = {
    2: "the configuration cannot be used",
    3: "the model cannot be read",
    4: "the device cannot run it",
    5: "the engine died",
    6: "a step hung",
}


class APIClient:
    """Talks to one server. Thread-safe; use as a context manager, or close it."""

    def __init__(self, api_server_url: str = "http://127.0.0.1:23333", api_key: str | None = None) -> None:
        url = api_server_url if "://" in api_server_url else f"http://{api_server_url}"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{api_server_url}: is no address of a server; write http://HOST:PORT.")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname or "", parts.hostname or "")  # reached over loopback
        port = f":{parts.port}" if parts.port else ""
        self.url = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path.rstrip('/')}"
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_S),  # an answer takes as long as it takes; streams carry pings
            trust_env=not is_loopback(host),  # a proxy of the environment does not lead to this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -- questions about the server -----------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether /health says 200; False where nobody answers."""
        try:
            return self._http.get("/health", timeout=CONNECT_S).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def available_models(self) -> list[str]:
        """Names that requests may give as their model."""
        return [str(model["id"]) for model in self.get("/v1/models")["data"]]

    def get_model_list(self) -> list[str]:
        return self.available_models

    # -- requests -----------------------------------------------------------------------------------------

    def chat_completions_v1(
        self, model: str | None = None, messages: str | Sequence[dict[str, Any]] = "", stream: bool = False, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """POST /v1/chat/completions; yields the answer, or its chunks. `model` None: whatever is served."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return self._objects("/v1/chat/completions", {"model": model, "messages": asked, **fields}, stream)

    def completions_v1(
        self, model: str | None = None, prompt: str | Sequence[Any] = "", stream: bool = False, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """POST /v1/completions; yields the answer, or its chunks."""
        return self._objects("/v1/completions", {"model": model, "prompt": prompt, **fields}, stream)

    def chat_interactive_v1(
        self,
        prompt: str | Sequence[dict[str, Any]],
        session_id: int = -1,
        interactive_mode: bool = False,
        stream: bool = False,
        **fields: Any,
    ) -> Iterator[dict[str, Any]]:
        """POST /v1/chat/interactive: the server keeps the session. Yields the answer, or its pieces (one JSON a line)."""
        body = {"prompt": prompt, "session_id": session_id, "interactive_mode": interactive_mode, **fields}
        if not stream:
            yield self.post("/v1/chat/interactive", body)
            return
        for line in self.lines("/v1/chat/interactive", body | {"stream": True}):
            yield _checked(json.loads(line))

    def encode(self, input: str | Sequence[str], do_preprocess: bool = False, add_bos: bool = True) -> tuple[Any, Any]:
        """POST /v1/encode: (ids, how many) of a text, lists of both for several."""
        answer = self.post("/v1/encode", {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos})
        return answer["input_ids"], answer["length"]

    def get_ppl(self, input: str | Sequence[Any]) -> list[float]:
        """POST /get_ppl: mean cross entropy (nats) of a text or ids, or of each of several; exp() of it is the perplexity."""
        found = self.post("/get_ppl", {"input": input})["ppl"]
        return list(found) if isinstance(found, list) else [float(found)]

    def chat(self, messages: Sequence[dict[str, Any]], **fields: Any) -> Iterator[str]:
        """The text of an answer as it comes."""
        for chunk in self.chat_completions_v1(messages=messages, stream=True, **fields):
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text

    # -- HTTP ---------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """The JSON that a path answers."""
        with self._errors():
            return _body(self._http.get(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that a path answers to `body`; keys whose value is None are left out."""
        with self._errors():
            return _body(self._http.post(path, json=_given(body)))

    def lines(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        """The lines of a streamed answer; leaving early closes the connection, which ends the answer on the server."""
        with self._errors(), self._http.stream("POST", path, json=_given(body)) as response:
            if response.status_code >= 400:
                response.read()
                _body(response)
            for line in response.iter_lines():
                if line:
                    yield line

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of an event stream, until [DONE]; an error event is raised."""
        for line in self.lines(path, body):
            if line.startswith("data: ") and line != "data: [DONE]":
                yield _checked(json.loads(line.removeprefix("data: ")))

    def _objects(self, path: str, body: dict[str, Any], stream: bool) -> Iterator[dict[str, Any]]:
        if stream:
            yield from self.events(path, body | {"stream": True})
        else:
            yield _checked(self.post(path, body))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise ConnectionError(f"Nobody answers at {self.url}; start a server there: numbatch serve api_server MODEL.") from None
        except httpx.HTTPError as error:
            raise ConnectionError(f"The connection to {self.url} broke: {type(error).__name__}.") from error


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _body(response: httpx.Response) -> Any:
    try:
        value = response.json()
    except ValueError:
        raise RuntimeError(f"The server answered {response.status_code} without JSON; is {response.url} a numbatch server?") from None
    if response.status_code >= 400:
        error = value.get("error") if isinstance(value, dict) else None
        message = error.get("message") if isinstance(error, dict) else error  # KServe's is the sentence itself
        text = str(message or f"The server answered {response.status_code}.")
        raise ValueError(text) if response.status_code < 500 else RuntimeError(text)
    return value


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    error = value.get("error")
    if error:
        raise RuntimeError(str(error.get("message", "The server ended the answer.") if isinstance(error, dict) else error))
    return value


class RunningServer(APIClient):
    """`python server.py` as a child process, and the client of it. The child ends with this process, also if that is killed."""

    def __init__(self, config: Config, scratch: tempfile.TemporaryDirectory[str] | None = None) -> None:
        """Start, and wait until it is ready. `scratch` is removed when it ends. Raises RuntimeError if it ends at once."""
        server = config.server
        if server.ssl_certfile:
            raise ValueError("server.ssl_certfile: serve() speaks plain HTTP to the server it starts; for TLS start server.py itself.")
        if server.server_port == 0:
            config = dataclasses.replace(config, server=dataclasses.replace(server, server_port=_free_port(server.server_name)))
        host = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
        super().__init__(f"http://{host}:{config.server.server_port}", server.api_keys[0] if server.api_keys else None)
        if self.is_ready():
            raise RuntimeError(f"Port {config.server.server_port} is taken; give another server_port, or 0 for a free one.")
        self._scratch = scratch
        self._grace_s = config.shutdown.drain_delay_s + config.shutdown.drain_timeout_s + STOP_S
        command, environment = _command(config)
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)  # closed when this process ends, however
        atexit.register(self._at_exit)
        try:
            while not self.is_ready():
                code = self.process.poll()
                if code is not None:
                    why = ENDINGS.get(code, "something else went wrong")
                    raise RuntimeError(f"The server ended with exit code {code} before it was ready: {why} (its own words are above).")
                time.sleep(POLL_S)
        except BaseException:
            self.close()
            raise

    def wait(self) -> int:
        """Until the server ends by itself or Ctrl-C stops it; its exit code."""
        try:
            return self.process.wait()
        except KeyboardInterrupt:
            self.close()
            return self.process.wait()

    def close(self) -> None:
        """Stop the server (it drains first); idempotent."""
        atexit.unregister(self._at_exit)
        super().close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(self._grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _at_exit(self) -> None:
        """A script that ran to its end with its server open meant to serve; one that failed, and a notebook, did not."""
        interactive = hasattr(sys, "ps1") or hasattr(builtins, "__IPYTHON__") or hasattr(sys, "last_value")
        if not interactive and self.process.poll() is None:
            print(f"numbatch serves on {self.url} (process {self.process.pid}); Ctrl-C stops it", file=sys.stderr, flush=True)
            self.wait()
        self.close()


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _command(config: Config) -> tuple[list[str], dict[str, str]]:
    """Command line and environment. Knobs go on the command line; secrets into the environment, where only this user can read them."""
    command = [sys.executable, str(Path(__file__).resolve().parent.parent / "server.py"), "--stop-with-stdin"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    for knob in all_knobs():
        value = getattr(getattr(config, knob.section), knob.name)
        if value == knob.default:
            continue
        text = value if isinstance(value, str) else toml_value(value)
        if knob.secret:
            environment[f"{ENV_PREFIX}{knob.section}_{knob.name}".upper()] = text
        else:
            command += ["--set", f"{knob.key}={text}"]
    return command, environment
