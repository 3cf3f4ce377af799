"""`python -m cli.demo --config config/demo.toml`: start the server and say, when it is ready, how to talk to it.

The server is an ordinary `python server.py` in a child process; this program only waits for `/health` and prints.
SIGINT (Ctrl-C) and SIGTERM reach the server, which drains; the exit code is the server's.
"""

from __future__ import annotations

import argparse
import http.client
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from config.cli import load, parser
from config.errors import ConfigError
from config.schema import Config

POLL_S = 0.1


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    given = sys.argv[1:] if argv is None else argv
    return parser("python -m cli.demo").parse_args(given), given


def _address(config: Config) -> tuple[str, int]:
    """Where this machine reaches the server: a wildcard bind is reached over loopback."""
    name = config.server.server_name
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name), config.server.server_port


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def greeting(config: Config) -> str:
    """The address and a curl line that can be pasted."""
    host, port = _address(config)
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    name = config.model.model_name or Path(config.model.path).name
    key = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if config.server.api_keys else ""
    body = f'{{"model": "{name}", "stream": true, "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
    return (
        f"\nnumbatch is ready on {base}   (Ctrl-C stops it)\n\n"
        f"curl -N {base}/v1/chat/completions \\\n{key}  -H 'Content-Type: application/json' \\\n  -d '{body}'\n"
    )


def main(argv: list[str] | None = None) -> int:
    args, given = _arguments(argv)
    try:
        config = load(args).config
    except ConfigError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    host, port = _address(config)
    if config.server.ssl_certfile or port == 0:
        print("demo: needs plain HTTP on a fixed port; start server.py itself.", file=sys.stderr)
        return 2
    if _answers(host, port):
        print(
            f"demo: port {port} is taken by another program; stop it, or: make demo ARGS='--set server.server_port={port + 1}'",
            file=sys.stderr,
        )
        return 2

    began = time.monotonic()
    server = subprocess.Popen([sys.executable, str(Path(__file__).resolve().parent.parent / "server.py"), *given])
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends Ctrl-C to the server as well
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    ready = False
    while server.poll() is None:
        if not ready and _is_ready(host, port):
            ready = True
            print(f"{greeting(config)}\nready after {time.monotonic() - began:.1f} s", flush=True)
        time.sleep(POLL_S)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


if __name__ == "__main__":
    raise SystemExit(main())
