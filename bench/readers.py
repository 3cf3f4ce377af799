"""Clients that only count: many streamed completions over plain sockets in one process, for `bench.delivery`.

`python -m bench.readers PORT STREAMS MAX_TOKENS WARMUP_S SECONDS` opens the streams, waits until each has had an event, counts
events for SECONDS, closes everything and prints one JSON line. Standard library only and no parsing beyond the blank
line that ends an event, so that a core can read far more than a server can send.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Callable

OPEN_TIMEOUT_S = 30.0
READ_BYTES = 1 << 16
END = b"\n\n"
STATUS_BYTES = len(b"HTTP/1.1 200 ")


class Stream:
    __slots__ = ("counted", "events", "head", "socket", "tail")

    def __init__(self, port: int, body: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=OPEN_TIMEOUT_S)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket.sendall(head.encode() + body)
        self.socket.setblocking(False)
        self.events = 0  # since the stream began
        self.counted = 0  # of these, before the counting began
        self.head = b""  # the first bytes, where the status is
        self.tail = b""

    def read(self) -> int:
        """Bytes read; 0 at the end. Raises ValueError for anything but a 200."""
        data = self.socket.recv(READ_BYTES)
        if len(self.head) < STATUS_BYTES:
            self.head += data[:400]
            if len(self.head) >= STATUS_BYTES and b" 200 " not in self.head[:STATUS_BYTES]:
                raise ValueError(f"the server answered {self.head!r}")
        self.events += data.count(END) + (self.tail == b"\n" and data[:1] == b"\n")
        self.tail = data[-1:]
        return len(data)


def count(port: int, num_streams: int, max_tokens: int, warmup_s: float, seconds: float) -> dict[str, float]:
    """Events and bytes of all streams within `seconds`, and how evenly they were spread."""
    body = json.dumps({"prompt": [65, 66, 67], "max_tokens": max_tokens, "stream": True, "ignore_eos": True}).encode()
    streams = [Stream(port, body) for _ in range(num_streams)]
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    _read_until(selector, lambda: all(s.events for s in streams), OPEN_TIMEOUT_S)
    if not all(s.events for s in streams):
        raise ValueError(f"only {sum(s.events > 0 for s in streams)} of {num_streams} streams began within {OPEN_TIMEOUT_S:g} s")
    _read_until(selector, lambda: False, warmup_s)
    for stream in streams:
        stream.counted = stream.events
    started, cpu = time.perf_counter(), time.process_time()
    num_bytes = _read_until(selector, lambda: False, seconds)
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    got = [s.events - s.counted for s in streams]
    for stream in streams:
        stream.socket.close()
    in_all = sum(s.events for s in streams)
    spread = {"stream_min": min(got), "stream_max": max(got)}
    return {"events": sum(got), "events_in_all": in_all, "seconds": elapsed, "bytes": num_bytes, "cpu_s": cpu, **spread}


def _read_until(selector: selectors.BaseSelector, done: Callable[[], bool], seconds: float) -> int:
    end, num_bytes = time.perf_counter() + seconds, 0
    while (left := end - time.perf_counter()) > 0 and not done():
        for key, _ in selector.select(left):
            read = key.data.read()
            if not read:
                raise ValueError("a stream ended early")
            num_bytes += read
    return num_bytes


def main() -> int:
    port, num_streams, max_tokens, warmup_s, seconds = sys.argv[1:]
    try:
        print(json.dumps(count(int(port), int(num_streams), int(max_tokens), float(warmup_s), float(seconds))))
    except (OSError, ValueError) as error:
        print(f"bench.readers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
