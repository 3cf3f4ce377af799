"""Values that are fine alone and wrong together. Each finding names the key to change and says what to write.

Only what can be told from the configuration itself and the files it names: what contradicts a checkpoint or a
machine is refused where those are known (`engine/`).
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator
from pathlib import Path

from config.errors import ConfigError
from config.qos import read_qos
from config.schema import Config

MOST_SETTINGS = 1 << 24  # bytes of a config.json
QUANTIZED = ("awq", "gptq", "compressed-tensors", "fp8")  # as config.json's quant_method has them
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """True when `host` can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """(section.key, reason) for everything wrong, the gravest first."""
    yield from _server(config)
    yield from _model(config)
    yield from _limits(config)
    endpoint = config.telemetry.otlp_endpoint
    if endpoint and not re.fullmatch(r"https?://[^/\s]+/\S*", endpoint):
        yield "telemetry.otlp_endpoint", f"{endpoint!a} is no address of traces; write http://host:4318/v1/traces."


def _server(config: Config) -> Iterator[tuple[str, str]]:
    server = config.server
    if not server.server_name:
        yield "server.server_name", 'is empty; write "127.0.0.1" for this machine only, "0.0.0.0" for every address.'
    for key in server.api_keys:
        if not key:
            yield "server.api_keys", "holds an empty key, which would let everybody in; remove it."
        elif not re.fullmatch(r"[!-~]{1,512}", key):
            yield "server.api_keys", "a key must be 1 to 512 printable ASCII characters without spaces."
    if len(set(server.api_keys)) != len(server.api_keys):
        yield "server.api_keys", "holds the same key twice."
    if server.server_name and not is_loopback(server.server_name) and not server.api_keys and not server.insecure:
        yield (
            "server.server_name",
            f"{server.server_name} can be reached from other machines and there is no api key: "
            "set server.api_keys (or NUMBATCH_API_KEYS), or start with --insecure to serve everybody.",
        )
    if server.allow_credentials and "*" in server.allow_origins:
        yield "server.allow_credentials", "cannot be true while allow_origins holds '*': name the origins."
    for origin in server.allow_origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            yield "server.allow_origins", f"{origin!a} is not an origin; write scheme://host[:port] without a path, or '*'."
    for host in server.allowed_hosts:
        if not re.fullmatch(r"[A-Za-z0-9._:\[\]-]{1,255}", host):
            yield "server.allowed_hosts", f"{host[:60]!a} is not a host name."
    for mine, other in (("ssl_certfile", "ssl_keyfile"), ("ssl_keyfile", "ssl_certfile")):
        path = getattr(server, mine)
        if path and not getattr(server, other):
            yield f"server.{other}", f"is empty while {mine} is set; TLS needs both."
        if path and not Path(path).is_file():
            yield f"server.{mine}", f"{path[:200]!a} is not a file."


def _model(config: Config) -> Iterator[tuple[str, str]]:
    model, engine = config.model, config.engine
    if not model.path and engine.device != "mock":
        yield "model.path", "is empty; name a Hugging Face directory, a .gguf file or a hub name."
    if model.chat_template and not Path(model.chat_template).is_file():
        yield "model.chat_template", f"{model.chat_template[:200]!a} is not a file."
    if model.path and Path(model.path).exists():
        for name in ("revision", "download_dir"):
            if getattr(model, name):
                yield f"model.{name}", "is for hub names; model.path is here on disk. Remove one of the two."
    what, names = _format_on_disk(model.path)
    if names and model.model_format not in ("auto", *names):
        fitting = " or ".join(f'"{name}"' for name in (names[0], "auto"))
        yield "model.model_format", f'is "{model.model_format}", but model.path is {what}; write {fitting}.'
    if 0 < engine.rope_scaling_factor < 1:
        yield "engine.rope_scaling_factor", f"must be 0 (off) or at least 1, not {engine.rope_scaling_factor:g}."
    if engine.executor == "thread" and engine.tp > 1:
        yield "engine.executor", f'must be "process" (or "auto") with tp = {engine.tp}: a rank is a process.'
    if engine.mock_step_s > 0 and engine.device != "mock":
        yield "engine.mock_step_s", f'only means something with device = "mock", not "{engine.device}".'
    if not engine.kernel_cache_dir:
        yield "engine.kernel_cache_dir", "is empty; compiled kernels need a directory."


def _format_on_disk(path: str) -> tuple[str, tuple[str, ...]]:
    """What lies at `path`, in words, and the names that fit it, the most telling first; () where nothing is. A file is GGUF, a
    directory Hugging Face's layout, quantized as its config.json says."""
    place = Path(path)
    if not path or not place.exists():
        return "", ()
    if not place.is_dir():
        return "gguf", ("gguf",)
    settings = place / "config.json"
    if not settings.is_file() or settings.stat().st_size > MOST_SETTINGS:
        return "hf", ("hf", *QUANTIZED)  # how a workspace is quantized its own files say
    try:
        method = json.loads(settings.read_bytes())["quantization_config"]["quant_method"].lower()
    except (ValueError, KeyError, TypeError, AttributeError):
        return "hf, not quantized", ("hf",)
    return f"quantized by {ascii(method[:40]).strip(chr(39))}", (method, "hf")


def _limits(config: Config) -> Iterator[tuple[str, str]]:
    cache, engine, request, admission = config.cache, config.engine, config.request, config.admission
    positions = cache.num_blocks * cache.cache_block_seq_len
    if cache.num_blocks and engine.session_len > positions:
        needed = -(-engine.session_len // cache.cache_block_seq_len)
        yield (
            "engine.session_len",
            f"{engine.session_len} tokens do not fit into {cache.num_blocks} blocks of {cache.cache_block_seq_len} "
            f"({positions} positions): set cache.num_blocks to at least {needed}, or session_len to at most {positions}.",
        )
    if cache.num_blocks == 0 and cache.cache_max_entry_count == 0:
        yield "cache.cache_max_entry_count", "is 0 and cache.num_blocks is 0: there would be no KV cache."
    if admission.qos_config_path:
        try:
            read_qos(admission.qos_config_path)
        except ConfigError as error:
            yield "admission.qos_config_path", str(error)
    for name in ("max_requests", "max_requests_per_key"):
        bound = getattr(admission, name)
        if request.max_n > bound:
            yield f"admission.{name}", f"{bound} is less than request.max_n = {request.max_n}: such a request could never be admitted."
