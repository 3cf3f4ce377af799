"""The helper process that renders Jinja chat templates. Run as a script by `template_host.py`; imports jinja2 and the
standard library only, and nothing of this project.

A template comes with a checkpoint and is attacker input. The sandbox keeps it from Python's internals; what a sandbox
cannot bound (`'a' * 10**9`, `9**9**6`, nested loops) is bounded by this process being small, limited and killable:
512 MiB of address space, no file or socket can be opened once it has started, and the host kills it when time is up.

Both directions: length u32, JSON. First message: {"templates": {name: source}, "memory_bytes": n}. Then requests
{"template": name, "variables": {...}, "max_chars": n, "timeout_s": s}, each answered by {"text": ...} or
{"error": "syntax" | "refused" | "failed" | "budget", "message": ...}.
"""

from __future__ import annotations

import datetime
import json
import socket
import struct
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.debug  # jinja2 imports it when the first template fails, and then nothing can be opened any more
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

try:
    import resource
except ImportError:  # not POSIX: the time limit remains
    resource = None  # type: ignore[assignment]

MAX_MESSAGE_CHARS = 400


class Refused(Exception):
    """`raise_exception` was called in a template."""


class OutputTooLong(Exception):
    """More characters than the caller wants."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the answer for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> NoReturn:
    raise Refused(str(message))


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As in Hugging Face's environment: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """Jinja as Hugging Face sets it up for chat templates."""
    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.globals.pop("lipsum", None)
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    env.filters["tojson"] = tojson
    return env


class Renderer:
    """Templates by name, compiled when they are first used."""

    def __init__(self, templates: dict[str, str]) -> None:
        self.env = environment()
        self.sources = templates
        self.compiled: dict[str, jinja2.Template] = {}

    def render(self, name: str, variables: dict[str, Any], max_chars: int) -> str:
        template = self.compiled.get(name)
        if template is None:
            template = self.compiled[name] = self.env.from_string(self.sources[name])
        parts: list[str] = []
        left = max_chars
        for part in template.generate(variables):
            left -= len(part)
            if left < 0:
                raise OutputTooLong(f"more than {max_chars} characters")
            parts.append(part)
        return "".join(parts)


def answer(renderer: Renderer, request: dict[str, Any]) -> dict[str, str]:
    """Everything a template can raise, as one of four kinds."""
    try:
        return {"text": renderer.render(request["template"], request["variables"], request["max_chars"])}
    except Refused as e:
        return problem("refused", str(e))
    except OutputTooLong as e:
        return problem("budget", str(e))
    except MemoryError:
        return problem("budget", "more memory than a template may use")
    except RecursionError:
        return problem("budget", "nested too deeply")
    except jinja2.TemplateSyntaxError as e:
        return problem("syntax", f"line {e.lineno}: {e.message}")
    except Exception as e:  # whatever the template's expressions ran into
        return problem("failed", f"{type(e).__name__}: {e}")


def problem(kind: str, message: str) -> dict[str, str]:
    return {"error": kind, "message": message[:MAX_MESSAGE_CHARS]}


def receive(connection: socket.socket) -> Any:
    """One message; ends the process when the host is gone."""
    size = struct.unpack("<I", receive_exactly(connection, 4))[0]
    return json.loads(receive_exactly(connection, size))


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        n = connection.recv_into(view)
        if n == 0:
            sys.exit(0)
        view = view[n:]
    return bytes(data)


def send(connection: socket.socket, message: dict[str, str]) -> None:
    data = json.dumps(message).encode("ascii")
    connection.sendall(struct.pack("<I", len(data)) + data)


def limit_process(memory_bytes: int) -> None:
    if resource is None:
        return
    for name, value in (("RLIMIT_AS", memory_bytes), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_NPROC", 0), ("RLIMIT_NOFILE", 3)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):  # a limit that this system does not have, or that is lower already
            continue


def limit_cpu(seconds: float) -> None:
    """Should the host die while a template spins: CPU time ends too. A soft limit, moved on with each request."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    if hard == resource.RLIM_INFINITY or soft <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def warm_up() -> None:
    """Go once through what reads files the first time (imports, the time zone), while files can still be opened."""
    renderer = Renderer({"good": "{{ strftime_now('%Y %Z') }}{{ [{}] | tojson(indent=1) }}", "bad": "{{ 1 + x.y }}", "broken": "{% for"})
    for name in renderer.sources:
        answer(renderer, {"template": name, "variables": {}, "max_chars": 1 << 10})


def main() -> None:
    connection = socket.socket(fileno=0)
    setup = receive(connection)
    renderer = Renderer(setup["templates"])
    warm_up()
    limit_process(setup["memory_bytes"])
    while True:
        request = receive(connection)
        limit_cpu(request["timeout_s"])
        reply = answer(renderer, request)
        del request
        send(connection, reply)
        if reply.get("error") == "budget":
            sys.exit(0)  # start afresh rather than go on with a heap in an unknown state


if __name__ == "__main__":
    main()
