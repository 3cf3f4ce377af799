"""Every knob, once: one frozen dataclass a TOML section, one field a key.

`docs/config.md` is generated from this file, the loader (`config/load.py`) checks types, ranges and
choices from the metadata here, and nothing else in the code names a default. Nobody writes back into a
`Config`: what is discovered at run time (the number of KV blocks, say) is a value with its own name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

AUTO = "auto"


def knob(
    default: Any,
    doc: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[Any, ...] = (),
    secret: bool = False,
) -> Any:
    """A config field: default, one sentence for the reader, inclusive range or the allowed values."""
    meta = {"doc": doc, "min": min, "max": max, "choices": choices, "secret": secret}
    if isinstance(default, (list, dict)):
        raise TypeError("defaults are immutable: use a tuple")
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True)
class Server:
    """Where to listen and who may call."""

    server_name: str = knob("127.0.0.1", "Address to bind. A public one needs api_keys or insecure = true.")
    server_port: int = knob(23333, "TCP port; 0 lets the system choose.", min=0, max=65535)
    api_keys: tuple[str, ...] = knob((), "Bearer keys that may call; empty means no key is asked for.", secret=True)
    insecure: bool = knob(False, "Allow a public bind without api_keys.")
    allowed_hosts: tuple[str, ...] = knob((), "Accepted Host header names; empty: loopback names on a loopback bind, any otherwise.")
    allow_origins: tuple[str, ...] = knob((), "CORS: origins that browsers may call from; empty switches CORS off.")
    allow_credentials: bool = knob(False, "CORS: allow credentials; refused together with origin '*'.")
    allow_methods: tuple[str, ...] = knob(("*",), "CORS: methods.")
    allow_headers: tuple[str, ...] = knob(("*",), "CORS: request headers.")
    ssl_certfile: str = knob("", "TLS certificate chain (PEM); with ssl_keyfile switches TLS on.")
    ssl_keyfile: str = knob("", "TLS private key (PEM).")
    log_level: str = knob("INFO", "Least severe level that is logged.", choices=("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"))
    log_format: str = knob("text", "What a log record becomes: a line of text, or a JSON object on one line.", choices=("text", "json"))
    log_stats_s: float = knob(10.0, "Seconds between throughput log lines; 0 switches them off.", min=0, max=3600)


@dataclass(frozen=True, slots=True)
class Http:
    """Limits of one connection, enforced before work is done."""

    max_body_bytes: int = knob(8 << 20, "Largest request body, bytes.", min=1024, max=1 << 30)
    max_header_line: int = knob(8190, "Longest header line, bytes.", min=256, max=65536)
    max_headers: int = knob(64, "Most header fields in a request.", min=8, max=1024)
    header_timeout_s: float = knob(10.0, "Seconds from the first byte (or the connect) to complete headers.", min=0.1, max=600)
    body_gap_timeout_s: float = knob(30.0, "Longest silence inside a body, seconds.", min=0.1, max=600)
    keepalive_s: float = knob(75.0, "Idle seconds before a kept-alive connection is closed.", min=0.1, max=3600)
    max_connections: int = knob(8192, "Open connections; further ones are closed at accept.", min=1, max=1 << 20)
    write_stall_timeout_s: float = knob(30.0, "Seconds a reader may stall a stream before its request is aborted.", min=0.1, max=3600)
    stream_buffer_events: int = knob(256, "Events a stream may be behind before the stall clock starts.", min=1, max=1 << 20)
    stream_buffer_bytes: int = knob(65536, "Bytes a stream may be behind before the stall clock starts.", min=1024, max=1 << 30)
    sse_ping_s: float = knob(15.0, "Seconds of silence after which a stream carries an SSE comment; 0 switches them off.", min=0, max=3600)


@dataclass(frozen=True, slots=True)
class Request:
    """Bounds on the fields of one request; beyond them it is answered 400, naming the field."""

    max_n: int = knob(16, "Largest n.", min=1, max=1024)
    max_top_logprobs: int = knob(20, "Largest top_logprobs (completions: logprobs).", min=0, max=128)
    max_prompts: int = knob(64, "Prompts in one /v1/completions request.", min=1, max=4096)
    max_stop_strings: int = knob(16, "Stop strings in one request.", min=0, max=1024)
    max_stop_bytes: int = knob(256, "Longest stop string, UTF-8 bytes.", min=1, max=65536)
    max_stop_token_ids: int = knob(64, "Entries of stop_token_ids.", min=0, max=4096)
    max_logit_bias: int = knob(300, "Entries of logit_bias.", min=0, max=4096)
    max_salt_chars: int = knob(128, "Longest cache_salt, characters.", min=1, max=4096)
    max_messages: int = knob(1024, "Messages in one chat request.", min=1, max=1 << 20)
    max_stored_responses: int = knob(1024, "Answers of /v1/responses that are kept; the oldest go first.", min=0, max=1 << 20)
    template_timeout_s: float = knob(2.0, "Seconds a chat template may take to render.", min=0.1, max=60)


@dataclass(frozen=True, slots=True)
class Admission:
    """How much may wait before new requests are refused with Retry-After."""

    max_requests: int = knob(512, "Sequences waiting or running; one more is answered 503.", min=1, max=1 << 20)
    max_requests_per_key: int = knob(512, "The same for one API key; one more is answered 429.", min=1, max=1 << 20)
    max_queue_tokens: int = knob(0, "Prompt tokens that may wait; 0 means four times the KV pool.", min=0)
    max_queue_tokens_per_key: int = knob(0, "The same of one API key, answered 429; 0: no bound of its own.", min=0)
    max_queue_age_s: float = knob(30.0, "Longest wait for a first step, seconds; then 503.", min=0.1, max=3600)
    qos_config_path: str = knob("", "JSON file with user groups and quotas, for requests that carry user_id; empty: none.")


@dataclass(frozen=True, slots=True)
class Sessions:
    """What a conversation with a session_id keeps between its turns."""

    max_sessions: int = knob(1024, "Sessions that are remembered; the one that was idle longest makes room.", min=1, max=1 << 20)
    lease_s: float = knob(600.0, "Seconds after a turn for which its K/V is kept; later it is computed again.", min=0.1, max=86400)
    max_pool_share: float = knob(0.5, "Share of the KV blocks that idle sessions may keep, all together.", min=0.0, max=1.0)


@dataclass(frozen=True, slots=True)
class Shutdown:
    """What SIGTERM does."""

    drain_delay_s: float = knob(
        0.0, "Seconds that the listener stays open after SIGTERM with readiness red (Kubernetes: 5).", min=0, max=600
    )
    drain_timeout_s: float = knob(30.0, "Seconds that running answers may take to finish.", min=0, max=86400)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Traces of requests, for a collector."""

    otlp_endpoint: str = knob("", "OTLP/HTTP address for traces, as http://127.0.0.1:4318/v1/traces; empty: none (extra: otel).")
    sample_ratio: float = knob(1.0, "Share of the requests without a traceparent that is traced.", min=0.0, max=1.0)


@dataclass(frozen=True, slots=True)
class Model:
    """Which model, and how its files are read."""

    path: str = knob("", "Hugging Face directory, .gguf file, or hub name.")
    model_name: str = knob("", "Name in /v1/models and in answers; empty: the last part of path.")
    model_format: str = knob(
        AUTO,
        "Checkpoint format; it is always read from the files, and a value that contradicts them is refused.",
        choices=(AUTO, "hf", "gguf", "awq", "gptq", "compressed-tensors", "fp8"),
    )
    dtype: str = knob(
        AUTO,
        "Computing type. auto: bfloat16 where the device is fast at it, else float32. float32 is the exact mode.",
        choices=(AUTO, "bfloat16", "float16", "float32"),
    )
    tokenizer: str = knob("", "Tokenizer file or directory; empty: beside the weights.")
    chat_template: str = knob("", "Jinja or LMDeploy-JSON template file; empty: the checkpoint's own.")
    revision: str = knob("", "Hub revision; empty: the default branch.")
    download_dir: str = knob("", "Where hub models are kept; empty: huggingface_hub's own cache.")


@dataclass(frozen=True, slots=True)
class Engine:
    """How the model runs."""

    device: str = knob(
        AUTO,
        "auto: cuda where there is one, else cpu. reference: slow numpy. mock: a fake model for tests of the server.",
        choices=(AUTO, "cpu", "cuda", "reference", "mock"),
    )
    device_memory_gib: float = knob(0.0, "Memory of a card that numbatch may use, GiB; 0: what the driver says is free.", min=0, max=65536)
    tp: int = knob(1, "Tensor-parallel ranks.", min=1, max=64)
    executor: str = knob(
        AUTO,
        "Where the runner lives; auto: a thread for one CPU rank, else one process a rank (always so on CUDA).",
        choices=(AUTO, "thread", "process"),
    )
    session_len: int = knob(0, "Most tokens of prompt + answer in one sequence; 0: the model's own maximum.", min=0, max=1 << 24)
    max_batch_size: int = knob(
        0, "Sequences in the persistent batch; 0: 512 on cards of 64 GiB and more, 256 on others, 64 on the CPU.", min=0, max=4096
    )
    max_prefill_token_num: int = knob(
        0,
        "Token budget of a step: running sequences first, prompt parts fill the rest; 0: 4096 on CUDA, 512 elsewhere.",
        min=0,
        max=1 << 20,
    )
    w4_dense_copy: str = knob(
        AUTO,
        "CUDA: keep a 16-bit copy of 4-bit weights for prompts (3 times the memory, no unpacking); auto: where it takes at most a "
        "quarter of what is free after the weights.",
        choices=(AUTO, "true", "false"),
    )
    check_ranks: bool = knob(False, "Compare what the ranks computed after every step; a difference ends the engine. For debugging.")
    num_threads: int = knob(
        0, "CPU threads of a rank, at most the cores this process may use; 0: those cores, shared among the ranks.", min=0, max=1024
    )
    kernel_cache_dir: str = knob(".cache/kernels", "Where compiled kernels are kept (made with mode 0700).")
    rope_scaling_factor: float = knob(0.0, "0: as the checkpoint says; 1 or more: dynamic NTK scaling with this factor.", min=0, max=1024)
    use_logn_attn: bool = knob(False, "Scale queries beyond the trained length by log_n, as Qwen-1 does.")
    step_timeout_s: float = knob(
        60.0, "A step that takes longer than this is a hung engine: the process exits with code 6.", min=0.1, max=3600
    )
    init_timeout_s: float = knob(600.0, "Longest start-up of a rank, seconds.", min=1, max=86400)
    mock_step_s: float = knob(0.0, "device = mock: seconds a step takes.", min=0, max=60)


@dataclass(frozen=True, slots=True)
class Cache:
    """The blocked KV cache."""

    cache_max_entry_count: float = knob(
        0.8, "Share of the memory that is free after the weights are loaded to give to KV blocks.", min=0.0, max=1.0
    )
    cache_max_bytes: int = knob(4 << 30, "Upper bound of the KV pool on the CPU, bytes; 0: none.", min=0)
    num_blocks: int = knob(0, "KV blocks; 0: from cache_max_entry_count.", min=0, max=1 << 28)
    cache_block_seq_len: int = knob(64, "Positions in a KV block.", choices=(1, 2, 4, 8, 16, 32, 64, 128))
    quant_policy: int = knob(0, "Bits that K and V are kept in: 0 as computed, 8 or 4 quantized per token and head.", choices=(0, 4, 8))
    enable_prefix_caching: bool = knob(True, "Reuse the K/V of prompts that begin alike.")
    share_across_keys: bool = knob(False, "Let API keys share cached prefixes (their timing can then tell what others sent).")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration, validated and frozen."""

    server: Server = Server()
    http: Http = Http()
    request: Request = Request()
    admission: Admission = Admission()
    sessions: Sessions = Sessions()
    shutdown: Shutdown = Shutdown()
    telemetry: Telemetry = Telemetry()
    model: Model = Model()
    engine: Engine = Engine()
    cache: Cache = Cache()
