"""Where a value comes from, and the one line that every bad one gets."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError
from config.load import KNOBS, MAX_FILE_BYTES, all_knobs, load_config, parse_text, render_effective
from config.schema import Config

MODEL = '[model]\npath = "hub/name"\n'


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def put(text: str | bytes) -> Path:
        path = tmp_path / "x.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return put


def refusal(path: Path | None, sets: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> str:
    """The message, with the file's folder taken off; it must be one printable line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, sets=sets, environ=environ or {})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message.replace(f"{path.parent}{os.sep}", "") if path else message


# --- precedence -------------------------------------------------------------------------------------------


def test_precedence_and_origins(write: Any) -> None:
    path = write(MODEL + "[engine]\ntp = 2\nmax_batch_size = 3\nnum_threads = 4\n")
    environ = {"NUMBATCH_ENGINE_TP": "4", "NUMBATCH_ENGINE_MAX_BATCH_SIZE": "5", "HOME": "/"}
    loaded = load_config(path, sets=["engine.tp=8"], environ=environ)
    engine = loaded.config.engine
    assert (engine.tp, engine.max_batch_size, engine.num_threads, engine.max_prefill_token_num) == (8, 5, 4, 0)
    assert loaded.origins["engine.tp"] == "--set"
    assert loaded.origins["engine.max_batch_size"] == "environment NUMBATCH_ENGINE_MAX_BATCH_SIZE"
    assert loaded.origins["engine.num_threads"] == f"file {path}"
    assert loaded.origins["engine.max_prefill_token_num"] == "default"
    assert set(loaded.origins) == {knob.key for knob in all_knobs()}


def test_no_file_is_all_defaults() -> None:
    loaded = load_config(None, sets=["model.path=m"], environ={})
    assert loaded.config == dataclasses.replace(Config(), model=dataclasses.replace(Config().model, path="m"))


def test_the_last_set_wins() -> None:
    assert load_config(None, sets=["model.path=a", "model.path=b=c"], environ={}).config.model.path == "b=c"


def test_api_keys_short_variable(write: Any) -> None:
    loaded = load_config(write(MODEL + '[server]\napi_keys = ["old"]'), environ={"NUMBATCH_API_KEYS": "one, two"})
    assert loaded.config.server.api_keys == ("one", "two")
    both = {"NUMBATCH_API_KEYS": "a", "NUMBATCH_SERVER_API_KEYS": "b"}
    assert "is given twice" in refusal(write(MODEL), environ=both)


def test_a_key_on_the_command_line_is_warned_of_and_not_shown() -> None:
    loaded = load_config(None, sets=["model.path=m", "server.api_keys=hunter2"], environ={})
    assert "command line" in loaded.warnings[0]
    assert "hunter2" not in loaded.warnings[0]


def test_the_configuration_is_frozen(write: Any) -> None:
    config = load_config(write(MODEL), environ={}).config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.engine.tp = 2  # type: ignore[misc]


def test_every_value_of_the_file_arrives(write: Any) -> None:
    """Each knob once, with a value that is not its default."""
    for knob in all_knobs():
        if knob.choices:
            value = next((c for c in knob.choices if c != knob.default), None)
            if value is None:
                continue  # one choice only
        elif knob.type is bool:
            value = not knob.default
        elif knob.type in (int, float):
            value = knob.type(knob.high if knob.high is not None and knob.high != knob.default else knob.default + 1)
            value = max(value, knob.low or 0)
        else:
            value = "/nowhere" if knob.type is str else ("a",)
        shown = f'"{value}"' if isinstance(value, str) else str(list(value)) if isinstance(value, tuple) else str(value).lower()
        sections = {knob.section: f"{knob.name} = {shown}\n"}
        if knob.key != "model.path":
            sections["model"] = 'path = "m"\n' + sections.get("model", "")
        text = "".join(f"[{name}]\n{body}" for name, body in sections.items())
        try:
            config = load_config(write(text), environ={}).config
        except ConfigError as error:  # right type and range, but alone it contradicts a default
            assert f"{knob.section}." in str(error) or knob.section in ("engine", "request"), str(error)
        else:
            assert getattr(getattr(config, knob.section), knob.name) == value
            assert type(getattr(getattr(config, knob.section), knob.name)) is type(value)


# --- refusals ---------------------------------------------------------------------------------------------

REFUSED = [
    # unknown names
    ("[engin]\ntp = 1", "x.toml:engin: unknown section; did you mean [engine]?"),
    ("[engine]\ntpp = 1", "x.toml:engine.tpp: unknown key; did you mean engine.tp?"),
    ("[engine]\nsesion_len = 1", "x.toml:engine.sesion_len: unknown key; did you mean engine.session_len?"),
    ("[server]\ntp = 1", "x.toml:server.tp: unknown key; tp belongs under [engine]."),
    ("[engine]\ninstance_num = 1", "x.toml:engine.instance_num: unknown key; here it is called engine.max_batch_size."),
    ("tp = 1", "x.toml:tp: is a key, not a section; it belongs under [engine]."),
    ("engine = 3", "x.toml:engine: is a table: write [engine] on a line of its own, its keys below."),
    ("[[engine]]\ntp = 1", "x.toml:engine: is a table: write [engine] on a line of its own, its keys below."),
    ('["a\\u001b[2J\\n"]\nb = 1', "x.toml:a\\x1b[2J\\n: unknown section; there are"),
    # exact types
    ("[engine]\ntp = true", "x.toml:engine.tp: must be an integer, not true or false."),
    ("[engine]\ntp = 1.0", "x.toml:engine.tp: must be an integer, not a float."),
    ('[engine]\ntp = "1"', "x.toml:engine.tp: must be an integer, not a string."),
    ("[engine]\ntp = 1979-05-27", "x.toml:engine.tp: must be an integer, not a date or time."),
    ("[engine.tp]\nx = 1", "x.toml:engine.tp: must be an integer, not a table."),
    ("[server]\ninsecure = 1", "x.toml:server.insecure: must be true or false, not an integer."),
    ("[cache]\ncache_max_entry_count = true", "x.toml:cache.cache_max_entry_count: must be a number, not true or false."),
    ("[server]\nserver_name = 1", "x.toml:server.server_name: must be a string, not an integer."),
    ('[server]\napi_keys = "a"', "x.toml:server.api_keys: must be an array of strings, not a string."),
    ("[server]\nallow_origins = [1]", "x.toml:server.allow_origins: must be an array of strings; one item is an integer."),
    ('[model]\npath = "a\\u0000b"', "x.toml:model.path: holds a control character."),
    # finite, in range, one of the choices
    ("[cache]\ncache_max_entry_count = nan", "x.toml:cache.cache_max_entry_count: must be a finite number, not nan."),
    ("[http]\nkeepalive_s = -inf", "x.toml:http.keepalive_s: must be a finite number, not -inf."),
    ("[cache]\ncache_max_entry_count = 1.5", "x.toml:cache.cache_max_entry_count: must be between 0 and 1, not 1.5."),
    ("[engine]\ntp = 0", "x.toml:engine.tp: must be between 1 and 64, not 0."),
    ("[engine]\ntp = -1", "x.toml:engine.tp: must be between 1 and 64, not -1."),
    ("[cache]\ncache_max_bytes = -1", "x.toml:cache.cache_max_bytes: must be at least 0, not -1."),
    ("[cache]\ncache_block_seq_len = 48", "x.toml:cache.cache_block_seq_len: must be one of 1, 2, 4, 8, 16, 32, 64, 128; not 48."),
    ('[engine]\ndevice = "cuba"', "x.toml:engine.device: must be one of auto, cpu, cuda, reference, mock; not cuba. Did you mean cuda?"),
    ('[model]\ndtype = "bfloat"', "not bfloat. Did you mean bfloat16?"),
    # hostile numbers and nesting
    ("[engine]\ntp = " + "9" * 5000, "x.toml:engine.tp: the number has too many digits."),
    ("[engine]\ntp = 0x" + "9" * 5000, "x.toml:engine.tp: the number has too many digits."),
    ("[engine]\ntp = 99999999999999999999", "x.toml:engine.tp: the number has too many digits."),
    ("[engine]\ntp = " + "[" * 5000, "x.toml: is nested too deeply; values here are at most a list of strings."),
    ("[engine]\ntp = " + "{a=" * 5000, "x.toml: is nested too deeply; values here are at most a list of strings."),
    ("a" + ".a" * 5000 + " = 1", "x.toml:line 1: a key has more than 64 parts."),
    ("[server]\napi_keys = [" + '"a",' * 5000 + "]", "x.toml:server.api_keys: holds 5000 items; at most 4096 are read."),
    # not TOML
    ("[engine]\ntp = 1\ntp = 2", "x.toml:engine.tp: the key is given twice:"),
    ("[engine]\ntp = 1\n[engine]\n", "x.toml:line 3: not TOML: Cannot declare ('engine',) twice"),
    ("[engine]\ntp =\n", "x.toml:engine.tp: not TOML: Invalid value"),
    ("hello", "x.toml:line 1: not TOML:"),
    (b"\xff\xfe", "x.toml: is not UTF-8 (byte 0); save it as UTF-8."),
    (b"#" + b"x" * MAX_FILE_BYTES, f"x.toml: is larger than {MAX_FILE_BYTES} bytes; a configuration is not."),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refusal_is_one_line_naming_the_key(write: Any, text: str | bytes, expected: str) -> None:
    began = time.monotonic()
    message = refusal(write(text))
    assert message.startswith(expected) or (not expected.startswith("x.toml") and message.endswith(expected)), message
    assert time.monotonic() - began < 2.0


def test_unusable_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml").endswith("none.toml: there is no such file.")
    assert refusal(tmp_path).endswith(": is a directory; name a .toml file.")
    assert refusal(Path("a\0b")).endswith("cannot be read: not a usable file name.")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert refusal(fifo).endswith(": is not a regular file.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(write: Any) -> None:
    path = write(MODEL)
    path.chmod(0)
    assert refusal(path).endswith("cannot be read: Permission denied.")


def test_a_byte_order_mark_is_read_over(write: Any) -> None:
    assert load_config(write(b"\xef\xbb\xbf" + MODEL.encode()), environ={}).config.model.path == "hub/name"


CONTRADICTIONS = [
    ('[server]\nserver_name = "0.0.0.0"', "server.server_name", "start with --insecure"),
    ('[server]\nserver_name = "::"', "server.server_name", "no api key"),
    ('[server]\nserver_name = "myhost"', "server.server_name", "no api key"),
    ('[server]\nserver_name = ""', "server.server_name", "is empty"),
    ('[server]\napi_keys = ["good", ""]', "server.api_keys", "an empty key"),
    ('[server]\napi_keys = ["with space"]', "server.api_keys", "without spaces"),
    ('[server]\napi_keys = ["clé"]', "server.api_keys", "ASCII"),
    ('[server]\napi_keys = ["a", "a"]', "server.api_keys", "twice"),
    ('[server]\nallow_origins = ["*"]\nallow_credentials = true', "server.allow_credentials", "name the origins"),
    ('[server]\nallow_origins = ["example.org"]', "server.allow_origins", "is not an origin"),
    ('[server]\nallow_origins = ["https://example.org/"]', "server.allow_origins", "without a path"),
    ('[server]\nallowed_hosts = ["a b"]', "server.allowed_hosts", "not a host name"),
    ('[server]\nssl_certfile = "pyproject.toml"', "server.ssl_keyfile", "TLS needs both"),
    ('[server]\nssl_certfile = "no"\nssl_keyfile = "no"', "server.ssl_certfile", "is not a file"),
    ('[model]\npath = "m"\nchat_template = "no.jinja"', "model.chat_template", "is not a file"),
    ('[model]\npath = "."\nmodel_format = "gguf"', "model.model_format", 'write "hf" or "auto"'),
    ('[model]\npath = "pyproject.toml"\nmodel_format = "hf"', "model.model_format", 'write "gguf" or "auto"'),
    ('[model]\npath = "deploy"\nmodel_format = "gguf"', "model.model_format", "but model.path is hf"),
    ('[model]\npath = "."\nrevision = "main"', "model.revision", "is for hub names"),
    ("[engine]\nrope_scaling_factor = 0.5", "engine.rope_scaling_factor", "must be 0 (off) or at least 1"),
    ('[engine]\nexecutor = "thread"\ntp = 2', "engine.executor", "a rank is a process"),
    ("[engine]\nmock_step_s = 0.1", "engine.mock_step_s", "only means something"),
    ('[engine]\nkernel_cache_dir = ""', "engine.kernel_cache_dir", "is empty"),
    ("[engine]\nsession_len = 257\n[cache]\nnum_blocks = 4", "engine.session_len", "set cache.num_blocks to at least 5"),
    ("[cache]\ncache_max_entry_count = 0", "cache.cache_max_entry_count", "no KV cache"),
    ("[admission]\nmax_requests = 4", "admission.max_requests", "less than request.max_n = 16"),
]


@pytest.mark.parametrize(("text", "key", "reason"), CONTRADICTIONS, ids=[f"{key}-{i}" for i, (_, key, _) in enumerate(CONTRADICTIONS)])
def test_contradictions(write: Any, text: str, key: str, reason: str) -> None:
    message = refusal(write(text if "[model]" in text else MODEL + text))
    assert reason in message
    assert f"{key}: " in message


def test_a_format_that_contradicts_the_files_is_refused_with_both(write: Any, tmp_path: Path) -> None:
    settings = tmp_path / "model" / "config.json"
    settings.parent.mkdir()
    for quantization, name, sentence in (
        ({"quant_method": "awq"}, "gptq", 'is "gptq", but model.path is quantized by awq; write "awq" or "auto".'),
        ({"quant_method": "fp8"}, "compressed-tensors", 'is "compressed-tensors", but model.path is quantized by fp8; write "fp8" or "auto".'),
        (None, "awq", 'is "awq", but model.path is hf, not quantized; write "hf" or "auto".'),
        ({}, "fp8", 'is "fp8", but model.path is hf, not quantized; write "hf" or "auto".'),
    ):
        settings.write_text(json.dumps({"quantization_config": quantization} if quantization is not None else {}))
        text = f'[model]\npath = "{settings.parent}"\nmodel_format = '
        assert sentence in refusal(write(f'{text}"{name}"'))
        for fitting in ("auto", "hf", *((quantization or {}).values())):
            load_config(write(f'{text}"{fitting}"'), environ={})


@pytest.mark.parametrize(
    "text",
    [
        '[server]\nserver_name = "0.0.0.0"\napi_keys = ["k"]',
        '[server]\nserver_name = "0.0.0.0"\ninsecure = true',
        '[server]\nserver_name = "localhost"',
        '[server]\nserver_name = "::1"',
        '[server]\nserver_name = "127.0.0.9"',
        '[server]\nallow_origins = ["https://example.org:8443", "http://localhost"]\nallow_credentials = true',
        "[engine]\nsession_len = 256\n[cache]\nnum_blocks = 4",
        "[engine]\nrope_scaling_factor = 2",
        '[model]\npath = "."\nmodel_format = "hf"',
        '[model]\npath = "hub/name"\nmodel_format = "hf"',
    ],
)
def test_accepted(write: Any, text: str) -> None:
    load_config(write(text if "[model]" in text else MODEL + text), environ={})


def test_a_model_must_be_named_unless_it_is_mocked(write: Any) -> None:
    assert "model.path: is empty" in refusal(None)
    assert load_config(write('[engine]\ndevice = "mock"'), environ={}).config.model.path == ""


# --- environment and --set --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("engine.tp", "--set engine.tp: write --set section.key=value."),
        ("tp=2", "--set tp: write --set section.key=value."),
        ("engin.tp=2", "--set:engin.tp: unknown section; did you mean [engine]?"),
        ("engine.tpp=2", "--set:engine.tpp: unknown key; did you mean engine.tp?"),
        ("engine.tp=two", "--set:engine.tp: must be an integer, not two."),
        ("engine.tp=", "--set:engine.tp: must be an integer, not an empty string."),
        ("engine.tp=1_0", "--set:engine.tp: must be an integer, not 1_0."),
        ("engine.tp=２", "--set:engine.tp: must be an integer, not \\uff12."),
        ("engine.tp=" + "9" * 5000, "--set:engine.tp: must be an integer, not 9999"),
        ("engine.tp=0", "--set:engine.tp: must be between 1 and 64, not 0."),
        ("http.keepalive_s=nan", "--set:http.keepalive_s: must be a number, not nan."),
        ("http.keepalive_s=1e999", "--set:http.keepalive_s: must be a finite number, not inf."),
        ("server.insecure=yes", "--set:server.insecure: must be true or false, not yes."),
        ("server.api_keys=[1", "--set:server.api_keys: must be a comma-separated list"),
        ("server.api_keys=[1]", "--set:server.api_keys: must be an array of strings; one item is an integer."),
        ("model.dtype=half", "--set:model.dtype: must be one of"),
    ],
)
def test_set_refusals(sets: str, expected: str) -> None:
    assert refusal(None, (sets,)).startswith(expected)


def test_text_is_read_by_the_type_of_the_knob() -> None:
    sets = ["model.path=123", "http.keepalive_s=7", "server.insecure=TRUE", "server.allow_methods=GET,POST", 'server.allow_headers=["x,y"]']
    config = load_config(None, sets=sets, environ={}).config
    assert config.model.path == "123"
    assert config.http.keepalive_s == 7.0
    assert type(config.http.keepalive_s) is float
    assert config.server.insecure is True
    assert config.server.allow_methods == ("GET", "POST")
    assert config.server.allow_headers == ("x,y",)


def test_unknown_variables_are_refused_except_kubernetes(write: Any) -> None:
    message = refusal(write(MODEL), environ={"NUMBATCH_SERVER_API_KEY": "secret"})
    assert message == "environment NUMBATCH_SERVER_API_KEY: is not a knob; did you mean NUMBATCH_SERVER_API_KEYS?"
    assert "is not a knob" in refusal(write(MODEL), environ={"NUMBATCH_SERVER_PORT": "8080"})
    service = {
        "NUMBATCH_SERVICE_HOST": "10.0.0.1",
        "NUMBATCH_SERVICE_PORT": "80",
        "NUMBATCH_PORT": "tcp://10.0.0.1:80",
        "NUMBATCH_SERVER_PORT": "tcp://10.0.0.1:80",
        "NUMBATCH_PORT_80_TCP_ADDR": "10.0.0.1",
        "NUMBATCH_MODELS": "elsewhere",
    }
    load_config(write(MODEL), environ=service)


def test_the_process_environment_is_the_default(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBATCH_ENGINE_TP", "2")
    assert load_config(write(MODEL)).config.engine.tp == 2


# --- secrets, showing, fuzz -------------------------------------------------------------------------------


def test_secrets_are_shown_nowhere(write: Any) -> None:
    loaded = load_config(write(MODEL + '[server]\napi_keys = ["hunter2"]'), environ={})
    assert "hunter2" not in render_effective(loaded)
    for text in (
        'api_keys = ["hunter2", ""]',
        'api_keys = ["hunter2 x"]',
        'api_keys = ["hunter2", "hunter2"]',
        'api_keys = ["hunter2", 3]',
    ):
        assert "hunter2" not in refusal(write(MODEL + f"[server]\n{text}"))
    assert "hunter2" not in refusal(None, ("server.api_keys=[hunter2",))


def test_the_effective_configuration_reads_back(write: Any) -> None:
    loaded = load_config(write(MODEL + '[server]\nserver_name = "a\\"b\\\\c"\ninsecure = true\n'), sets=["engine.tp=2"], environ={})
    text = render_effective(loaded)
    assert load_config(write(text), environ={}).config == loaded.config
    assert "# --set" in next(line for line in text.splitlines() if line.startswith("tp = "))


def test_defaults_lie_within_their_own_bounds() -> None:
    for knob in all_knobs():
        default = knob.default
        assert type(default) is (tuple if knob.type == tuple[str, ...] else knob.type), knob.key
        assert not knob.choices or default in knob.choices, knob.key
        if knob.low is not None:
            assert default >= knob.low, knob.key
        if knob.high is not None:
            assert default <= knob.high, knob.key
        assert knob.doc.endswith("."), knob.key


def test_repository_files_are_valid(root: Path) -> None:
    for path in sorted((root / "config").glob("*.toml")):
        sets = ["model.path=m"] if path.name == "example.toml" else []
        load_config(path, sets=sets, environ={})
    assert (
        load_config(root / "config" / "example.toml", sets=["model.path=m"], environ={}).config
        == load_config(None, sets=["model.path=m"], environ={}).config
    )


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    for section in KNOBS.values():
        for knob in section.values():
            try:
                value = parse_text(knob, text, "here")
            except ConfigError as error:
                assert str(error).isprintable()
            else:
                assert type(value) is (tuple if knob.type == tuple[str, ...] else knob.type)
                assert not isinstance(value, float) or math.isfinite(value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet="[]{}=\"'.,#\n ae1_-:T", max_size=200).map(str.encode))
def test_any_file_is_a_configuration_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(data)
    try:
        load_config(path, sets=["model.path=m"], environ={})
    except ConfigError as error:
        assert str(error).isprintable()
