"""From a TOML file, the environment and `--set` to one frozen, checked `Config`.

Precedence: `--set section.key=value`, then NUMBATCH_SECTION_KEY (and NUMBATCH_API_KEYS), then the file, then the
default in `config/schema.py`. Every refusal is one line, `where:section.key: reason`, and nothing is guessed:
an unknown key is an error that names the nearest one. A file is bounded before it is parsed, because a parser can
be made to work for minutes by a small file. This module knows no model and no machine.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from config.checks import contradictions
from config.errors import ConfigError
from config.names import SAME
from config.schema import Config

MAX_FILE_BYTES = 1 << 16
MAX_KEY_DOTS = 64  # tomllib's work grows with the square of a dotted key's length
LONG_KEY = re.compile(r"(\.[^.\"'#,=]{0,64}){64}")
MAX_ITEMS = 4096
ENV_PREFIX = "NUMBATCH_"
ENV_SHORT = {"NUMBATCH_API_KEYS": "server.api_keys"}
ENV_IGNORED = ("NUMBATCH_MODELS", "NUMBATCH_TEST_")  # used by the tests, not knobs
# Kubernetes puts such variables into every pod for a Service whose name begins with "numbatch".
ENV_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP|SCTP)")

# Names from other servers and from LMDeploy's past: the answer is a sentence, not a guess.
ELSEWHERE = {
    "host": "server.server_name",
    "port": "server.server_port",
    "api_key": "server.api_keys",
    "instance_num": "engine.max_batch_size",
    "max_num_seqs": "engine.max_batch_size",
    "max_num_batched_tokens": "engine.max_prefill_token_num",
    "max_context_token_num": "engine.max_prefill_token_num",
    "max_model_len": "engine.session_len",
    "tensor_parallel_size": "engine.tp",
    "tensor_para_size": "engine.tp",
    "gpu_memory_utilization": "cache.cache_max_entry_count",
    "block_size": "cache.cache_block_seq_len",
    "kv_cache_dtype": "cache.quant_policy",
    "served_model_name": "model.model_name",
    "model_path": "model.path",
}


@dataclass(frozen=True, slots=True)
class Knob:
    """One key as the loader needs it: where it lives, its exact type and its bounds."""

    section: str
    name: str
    type: Any  # str, int, float, bool or tuple[str, ...]
    default: Any
    doc: str
    low: float | None
    high: float | None
    choices: tuple[Any, ...]
    secret: bool

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The configuration; for each `section.key`, where its value came from; what the log should warn of."""

    config: Config
    origins: dict[str, str]
    warnings: tuple[str, ...] = ()


def _read_schema() -> dict[str, dict[str, Knob]]:
    sections: dict[str, dict[str, Knob]] = {}
    for section, cls in get_type_hints(Config).items():
        types = get_type_hints(cls)
        sections[section] = {
            f.name: Knob(
                section, f.name, types[f.name], f.default,
                f.metadata["doc"], f.metadata["min"], f.metadata["max"], f.metadata["choices"], f.metadata["secret"],
            )
            for f in fields(cls)
        }  # fmt: skip
    return sections


KNOBS: dict[str, dict[str, Knob]] = _read_schema()


def all_knobs() -> Iterator[Knob]:
    """Every knob in the order of the schema."""
    for section in KNOBS.values():
        yield from section.values()


def load_config(path: Path | None, *, sets: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> LoadedConfig:
    """Read, check and freeze the configuration; `ConfigError` is one line that names place, key and reason."""
    values: dict[str, Any] = {}
    origins = {knob.key: "default" for knob in all_knobs()}
    if path is not None:
        label = shown(str(path), 200)
        for knob, raw in _from_file(path, label):
            values[knob.key], origins[knob.key] = check_value(knob, raw, f"{label}:{knob.key}"), f"file {label}"
    for knob, name, text in _from_environment(environ):
        values[knob.key], origins[knob.key] = parse_text(knob, text, f"environment {name}:{knob.key}"), f"environment {name}"
    for knob, text in _from_sets(sets):
        values[knob.key], origins[knob.key] = parse_text(knob, text, f"--set:{knob.key}"), "--set"

    config = Config(
        **{
            section: cls(**{name: values[f"{section}.{name}"] for name in KNOBS[section] if f"{section}.{name}" in values})
            for section, cls in get_type_hints(Config).items()
        }
    )
    for key, reason in contradictions(config):
        raise ConfigError(f"{_place(origins[key])}:{key}: {reason}")
    on_argv = [knob.key for knob in all_knobs() if knob.secret and origins[knob.key] == "--set"]
    warnings = tuple(f"{key} was given on the command line, where other users of this machine can read it." for key in on_argv)
    return LoadedConfig(config, origins, warnings)


def _place(origin: str) -> str:
    return origin.removeprefix("file ")


# --- the file ---------------------------------------------------------------------------------------------


def _from_file(path: Path, label: str) -> Iterator[tuple[Knob, Any]]:
    document = _parse(_read(path, label), label)
    for section, table in document.items():
        if section not in KNOBS:
            raise ConfigError(f"{label}:{shown(section)}: {_unknown_section(section)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{label}:{section}: is a table: write [{section}] on a line of its own, its keys below.")
        for name, raw in table.items():
            if name not in KNOBS[section]:
                raise ConfigError(f"{label}:{section}.{shown(name)}: {_unknown_key(section, name)}")
            yield KNOBS[section][name], raw


def _read(path: Path, label: str) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{label}: is a directory; name a .toml file.")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{label}: is not a regular file.")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{label}: there is no such file.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else "not a usable file name"
        raise ConfigError(f"{label}: cannot be read: {reason}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{label}: is larger than {MAX_FILE_BYTES} bytes; a configuration is not.")
    try:
        return data.decode("utf-8-sig") + "\n"  # so that every error of the parser has a line number
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: is not UTF-8 (byte {error.start}); save it as UTF-8.") from None


def _parse(text: str, label: str) -> dict[str, Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MAX_KEY_DOTS and LONG_KEY.search(line):
            raise ConfigError(f"{label}:line {number}: a key has more than {MAX_KEY_DOTS} parts.")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{label}: is nested too deeply; values here are at most a list of strings.") from None
    except tomllib.TOMLDecodeError as error:
        message = " ".join(str(error).split())
        where = re.search(r"\(at line (\d+)", message)
        number = int(where.group(1)) if where else 0
        reason = "the key is given twice" if "overwrite a value" in message else "not TOML"
        raise ConfigError(f"{label}:{_locate(text, number)}: {reason}: {shown(message, 160)}.") from None
    except ValueError:  # an integer of more digits than Python converts
        number = next((n for n, line in enumerate(text.split("\n"), 1) if re.search(r"[0-9_]{4000}", line)), 0)
        raise ConfigError(f"{label}:{_locate(text, number)}: the number has too many digits.") from None


def _locate(text: str, number: int) -> str:
    """`section.key` of line `number`, as far as the line shows it; else the line."""
    section = ""
    lines = text.split("\n")[:number]
    for line in lines:
        header = re.match(r"\s*\[\s*([A-Za-z0-9_.-]{1,64})\s*\]", line)
        section = header.group(1) if header else section
    key = re.match(r"\s*([A-Za-z0-9_.-]{1,64})\s*=", lines[-1]) if lines else None
    if key:
        return f"{section}.{key.group(1)}" if section else key.group(1)
    return f"line {number}" if number else "file"


# --- environment and --set --------------------------------------------------------------------------------


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[Knob, str, str]]:
    names = {f"{ENV_PREFIX}{knob.section}_{knob.name}".upper(): knob for knob in all_knobs()}
    for short, key in ENV_SHORT.items():
        section, name = key.split(".")
        if short in environ and f"{ENV_PREFIX}{section}_{name}".upper() in environ:
            raise ConfigError(f"environment {short}:{key}: is given twice, also as {ENV_PREFIX}{section.upper()}_{name.upper()}.")
        names[short] = KNOBS[section][name]
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name.startswith(ENV_IGNORED):
            continue
        if name in names:
            yield names[name], name, environ[name]
        elif not (ENV_KUBERNETES.search(name) or (name.endswith("_PORT") and "://" in environ[name])):
            near = difflib.get_close_matches(name, names, 1, 0.5)
            raise ConfigError(f"environment {shown(name)}: is not a knob" + (f"; did you mean {near[0]}?" if near else "."))


def _from_sets(sets: Sequence[str]) -> Iterator[tuple[Knob, str]]:
    for item in sets:
        key, equals, text = item.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"--set {shown(key)}: write --set section.key=value.")
        if section not in KNOBS:
            raise ConfigError(f"--set:{shown(key)}: {_unknown_section(section)}")
        if name not in KNOBS[section]:
            raise ConfigError(f"--set:{shown(key)}: {_unknown_key(section, name)}")
        yield KNOBS[section][name], text


def parse_text(knob: Knob, text: str, where: str) -> Any:
    """A value given as text (environment, `--set`), read by the knob's type: never by what the text looks like."""
    text = text.strip()
    if knob.type is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{where}: must be true or false, not {_shown_value(knob, text)}.")
        return check_value(knob, text.lower() == "true", where)
    if knob.type is int:
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
            raise ConfigError(f"{where}: must be an integer, not {_shown_value(knob, text)}.")
        return check_value(knob, int(text), where)
    if knob.type is float:
        if not re.fullmatch(r"[+-]?([0-9]{1,32}(\.[0-9]{0,32})?|\.[0-9]{1,32})([eE][+-]?[0-9]{1,3})?", text):
            raise ConfigError(f"{where}: must be a number, not {_shown_value(knob, text)}.")
        return check_value(knob, float(text), where)
    if knob.type is str:
        return check_value(knob, text, where)
    if text.startswith("["):
        try:
            items = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            reason = 'must be a comma-separated list or a TOML array of strings such as ["a", "b"].'
            raise ConfigError(f"{where}: {reason}") from None
        return check_value(knob, items, where)
    return check_value(knob, [part.strip() for part in text.split(",")] if text else [], where)


# --- one value --------------------------------------------------------------------------------------------


def check_value(knob: Knob, raw: Any, where: str) -> Any:
    """`raw` as the knob's exact type, finite, in range, one of the choices; else `ConfigError`."""
    value = _typed(knob, raw, where)
    if knob.choices and value not in knob.choices:
        known = SAME.get(str(value).lower())
        texts = [str(choice) for choice in knob.choices]
        near = [known] if known in texts else difflib.get_close_matches(str(value), texts, 1) if knob.type is str else []
        allowed = ", ".join(str(choice) for choice in knob.choices)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: must be one of {allowed}; not {_shown_value(knob, value)}.{hint}")
    low, high = knob.low, knob.high
    if (low is not None or high is not None) and not ((low is None or value >= low) and (high is None or value <= high)):
        if high is None:
            bounds = f"at least {_number(low)}"
        else:
            bounds = f"between {_number(low)} and {_number(high)}" if low is not None else f"at most {_number(high)}"
        raise ConfigError(f"{where}: must be {bounds}, not {_shown_value(knob, value)}.")
    return value


def _typed(knob: Knob, raw: Any, where: str) -> Any:
    if knob.type is bool and type(raw) is bool:
        return raw
    if knob.type is int and type(raw) is int:
        if raw.bit_length() > 63:
            raise ConfigError(f"{where}: the number has too many digits.")
        return raw
    if knob.type is float and type(raw) in (int, float):
        if type(raw) is int and raw.bit_length() > 63:
            raise ConfigError(f"{where}: the number has too many digits.")
        if not math.isfinite(raw):
            raise ConfigError(f"{where}: must be a finite number, not {raw}.")
        return float(raw)
    if knob.type is str and type(raw) is str:
        return _clean(raw, where)
    if knob.type == tuple[str, ...] and type(raw) is list:
        if len(raw) > MAX_ITEMS:
            raise ConfigError(f"{where}: holds {len(raw)} items; at most {MAX_ITEMS} are read.")
        for item in raw:
            if type(item) is not str:
                raise ConfigError(f"{where}: must be an array of strings; one item is {_kind(item)}.")
        return tuple(_clean(item, where) for item in raw)
    wanted = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}.get(knob.type, "an array of strings")
    raise ConfigError(f"{where}: must be {wanted}, not {_kind(raw)}.")


def _clean(text: str, where: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise ConfigError(f"{where}: holds a control character.")
    return text


def _kind(raw: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
    return names.get(type(raw), "a date or time")


def _number(value: float | None) -> str:
    return str(int(value)) if value is not None and float(value).is_integer() else f"{value:g}"


def _shown_value(knob: Knob, value: Any) -> str:
    return "the value given (secret)" if knob.secret else shown(str(value)) or "an empty string"


def shown(text: str, limit: int = 60) -> str:
    """Foreign text made safe for one line of a message: printable ASCII, bounded."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return text.encode("unicode_escape").decode("ascii")


def _unknown_section(section: str) -> str:
    near = difflib.get_close_matches(section, KNOBS, 1)
    homes = [f"{home}.{section}" for home, names in KNOBS.items() if section in names]
    if homes:
        return f"is a key, not a section; it belongs under [{homes[0].split('.')[0]}]."
    return "unknown section; " + (f"did you mean [{near[0]}]?" if near else f"there are {', '.join(KNOBS)}.")


def _unknown_key(section: str, name: str) -> str:
    near = difflib.get_close_matches(name, KNOBS[section], 1, 0.7)
    if near:
        return f"unknown key; did you mean {section}.{near[0]}?"
    homes = [home for home, names in KNOBS.items() if name in names]
    if homes:
        return f"unknown key; {name} belongs under [{homes[0]}]."
    if name in ELSEWHERE:
        return f"unknown key; here it is called {ELSEWHERE[name]}."
    everywhere = {knob.name: knob.key for knob in all_knobs()}
    far = difflib.get_close_matches(name, KNOBS[section], 1, 0.4) or difflib.get_close_matches(name, everywhere, 1, 0.6)
    nearest = everywhere[far[0]] if far and far[0] in everywhere else ""
    return f"unknown key; did you mean {nearest}?" if nearest else f"unknown key; [{section}] has {', '.join(KNOBS[section])}."


# --- showing it -------------------------------------------------------------------------------------------


def toml_value(value: Any) -> str:
    """`value` as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)


def render_effective(loaded: LoadedConfig) -> str:
    """Every knob with its value and where it came from, as TOML that reads back; secrets are masked."""
    lines: list[str] = []
    for section, knobs in KNOBS.items():
        lines.append(f"[{section}]")
        table = getattr(loaded.config, section)
        for name, knob in knobs.items():
            value = getattr(table, name)
            masked = tuple("***" for _ in value) if knob.secret else value
            lines.append(f"{name} = {toml_value(masked)}".ljust(48) + f"  # {loaded.origins[knob.key]}")
        lines.append("")
    return "\n".join(lines)
