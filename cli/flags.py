"""LMDeploy's flags as knobs: one row a flag, with the key of the TOML file that it sets.

A command builds its parser from some sections of `FLAGS`, and turns what was given into `section.key=value` texts
for the configuration loader, where all checking happens. Each flag that was used is printed with its key, so that
the command line can become a file. What other servers have and numbatch does not is refused with a sentence (cli/theirs.py).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.arguments import RENAMED, Parser, UsageError
from cli.theirs import refusals
from config.checks import is_loopback
from config.errors import ConfigError
from config.given import QUANT_POLICIES, checkpoint_format
from config.load import KNOBS, LoadedConfig, all_knobs, load_config, toml_value

LOG_LEVELS = {"FATAL": "CRITICAL", "WARN": "WARNING", "NOTSET": "DEBUG"}  # LMDeploy's names that are others' twins


@dataclass(frozen=True, slots=True)
class Flag:
    """`kind`: "value", "values" (one or more words) or "switch". `key` "": a flag with a meaning of its own."""

    name: str
    key: str
    section: str
    help: str
    kind: str = "value"
    metavar: str = ""
    choices: tuple[str, ...] = ()


def _home(name: str, section: str) -> str:
    """section.key of a knob that another part of the program places; in `section` until it is there."""
    return next((knob.key for knob in all_knobs() if knob.name == name), f"{section}.{name}")


MODEL, ENGINE, CACHE, SERVER, ACCESS, LIMITS = "model", "engine", "cache", "server", "access", "limits"
FLAGS: tuple[Flag, ...] = (
    Flag("--model-name", "model.model_name", MODEL, "name in /v1/models and in answers", metavar="NAME"),
    Flag("--model-format", "model.model_format", MODEL, "hf, awq or gguf; always read from the files, a wrong name is refused",
         choices=("auto", "hf", "awq", "gptq", "gguf", "llama")),
    Flag("--dtype", "model.dtype", MODEL, "type that is computed in", choices=("auto", "bfloat16", "float16", "float32")),
    Flag("--revision", "model.revision", MODEL, "hub revision", metavar="REV"),
    Flag("--download-dir", "model.download_dir", MODEL, "where hub models are kept", metavar="DIR"),
    Flag("--chat-template", "", MODEL, "built-in name (numbatch list), LMDeploy-JSON file or Jinja file", metavar="NAME|FILE"),
    Flag("--meta-instruction", "", MODEL, "system text for conversations that bring none; superseded by --chat-template", metavar="TEXT"),
    Flag("--cap", "", MODEL, "chat, or completion: no template; superseded by --chat-template",
         choices=("chat", "completion", "infilling", "python")),
    Flag("--backend", "", ENGINE, "both names mean numbatch's one engine", choices=("turbomind", "pytorch")),
    Flag("--device", "engine.device", ENGINE, "where the model runs", choices=("auto", "cpu", "cuda", "reference", "mock")),
    Flag("--tp", "engine.tp", ENGINE, "tensor-parallel ranks; the model's heads must divide by it", metavar="N"),
    Flag("--session-len", "engine.session_len", ENGINE, "most tokens of prompt and answer in one sequence", metavar="N"),
    Flag("--max-batch-size", "engine.max_batch_size", ENGINE, "sequences that run at a time", metavar="N"),
    Flag("--max-prefill-token-num", "engine.max_prefill_token_num", ENGINE, "tokens of a step, prompt parts included", metavar="N"),
    Flag("--rope-scaling-factor", "engine.rope_scaling_factor", ENGINE, "0: off; 1 or more: dynamic NTK", metavar="X"),
    Flag("--use-logn-attn", "engine.use_logn_attn", ENGINE, "scale queries beyond the trained length by log n", "switch"),
    Flag("--cache-max-entry-count", "cache.cache_max_entry_count", CACHE, "share of the free memory that KV blocks get", metavar="X"),
    Flag("--cache-block-seq-len", "cache.cache_block_seq_len", CACHE, "positions in a KV block", metavar="N"),
    Flag("--enable-prefix-caching", "cache.enable_prefix_caching", CACHE, "reuse the K/V of prompts that begin alike (on unless a file "
         "says otherwise)", "switch"),
    Flag("--quant-policy", "cache.quant_policy", CACHE, "KV precision: 0 as computed, 4, 8 (or int4, int8)", metavar="N"),
    Flag("--server-name", "server.server_name", SERVER, "address to bind; 0.0.0.0 for every one", metavar="HOST"),
    Flag("--server-port", "server.server_port", SERVER, "port", metavar="PORT"),
    Flag("--log-level", "server.log_level", SERVER, "least severe level that is logged",
         choices=("CRITICAL", "FATAL", "ERROR", "WARN", "WARNING", "INFO", "DEBUG", "NOTSET")),
    Flag("--api-keys", "server.api_keys", ACCESS, "keys that may call; better in NUMBATCH_API_KEYS, which is private", "values", "KEY"),
    Flag("--ssl", "", ACCESS, "TLS, with the files that SSL_KEYFILE and SSL_CERTFILE name in the environment", "switch"),
    Flag("--allow-origins", "server.allow_origins", ACCESS, "CORS: origins that browsers may call from", "values", "ORIGIN"),
    Flag("--allow-credentials", "server.allow_credentials", ACCESS, "CORS: allow credentials", "switch"),
    Flag("--allow-methods", "server.allow_methods", ACCESS, "CORS: methods", "values", "METHOD"),
    Flag("--allow-headers", "server.allow_headers", ACCESS, "CORS: request headers", "values", "HEADER"),
    Flag("--max-requests", "admission.max_requests", LIMITS, "sequences that wait or run; one more is refused", metavar="N"),
    Flag("--qos-config-path", _home("qos_config_path", "admission"), LIMITS, "JSON file with user groups and quotas", metavar="FILE"),
)  # fmt: skip
BY_NAME = {flag.name: flag for flag in FLAGS}
REFUSED = {name: why for name, why in refusals().items() if name not in BY_NAME and name not in RENAMED}  # flags that no command has


def destination(flag: Flag) -> str:
    return "flag_" + flag.name.removeprefix("--").replace("-", "_")


def table() -> str:
    """The flags as a Markdown table, for docs/cli.md."""
    rows = ["| flag | key | meaning |", "|---|---|---|"]
    for flag in FLAGS:
        value = {"switch": "", "values": f" {flag.metavar} ..."}.get(flag.kind, f" {flag.metavar or '...'}").replace("|", "\\|")
        rows.append(f"| `{flag.name}{value}` | {f'`{flag.key}`' if flag.key else ''} | {flag.help} |")
    return "\n".join(rows)


def known(flag: Flag) -> bool:
    """Whether this version has the flag's knob."""
    section, _, name = flag.key.partition(".")
    return not flag.key or name in KNOBS.get(section, {})


def refused(sections: Iterable[str]) -> dict[str, str]:
    """Sentences for flags that this version, or a command with only these sections, does not take."""
    here = set(sections)
    out = dict(REFUSED)
    for flag in FLAGS:
        if not known(flag):
            out[flag.name] = f"this version has no {flag.key}; leave it out."
        elif flag.section not in here:
            out[flag.name] = "is about serving over a port; this command opens none. Leave it out."
    return out


def add_flags(parser: Parser, sections: Sequence[str]) -> None:
    """The flags of these sections, and `--config`, `--set`."""
    for section in sections:
        group = parser.add_argument_group(section)
        for flag in FLAGS:
            if flag.section != section or not known(flag):
                continue
            options: dict[str, Any] = {"dest": destination(flag), "default": None}
            key = f" [{flag.key}]" if flag.key else ""
            if flag.kind == "switch":
                options["action"] = "store_true"
            else:
                options |= {"metavar": flag.metavar or None, "choices": flag.choices or None}
                options |= {"nargs": "+"} if flag.kind == "values" else {}
            group.add_argument(flag.name, help=(flag.help + key).replace("%", "%%"), **options)
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", type=Path, metavar="FILE", help="TOML file; flags win over it (docs/config.md)")
    group.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="sets", help="any knob; repeatable")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the flags ask for: `loaded`, and the lines that say which knob each of them is."""

    loaded: LoadedConfig
    lines: tuple[str, ...]


def configuration(args: argparse.Namespace, *, model_path: str = "", defaults: Sequence[str] = (), template: str = "") -> Asked:
    """From parsed arguments to the checked configuration.

    `defaults`: `section.key=value` for what nobody gave. `template`: as --chat-template, where that is not given.
    Raises ConfigError or UsageError, each one line.
    """
    given: dict[str, tuple[str, str]] = {}  # key -> (flag as it was written, value as text)
    if model_path:
        given["model.path"] = ("MODEL", model_path)
    for flag in FLAGS:
        value = getattr(args, destination(flag), None)
        if value is not None and flag.key:
            given[flag.key] = (f"{flag.name} {_written(flag, value)}".rstrip(), _text(flag, value))
    given |= _ssl(args)
    loaded = _load(args, given, defaults)
    chosen = _chat_template(args, loaded, template)
    if chosen:
        given["model.chat_template"] = chosen
        loaded = _load(args, given, defaults)
    return Asked(loaded, tuple(_lines(args, given, loaded)))


def _load(args: argparse.Namespace, given: dict[str, tuple[str, str]], defaults: Sequence[str]) -> LoadedConfig:
    sets = [*args.sets, *(f"{key}={text}" for key, (_, text) in given.items())]
    try:
        loaded = load_config(args.config, sets=sets)
    except ConfigError as error:
        if "there is no api key" in str(error) and "server.server_name" in given:
            # LMDeploy's command line serves everybody when it is told an address; it does here too, and says so
            given["server.insecure"] = (given["server.server_name"][0], "true")
            return _load(args, given, defaults)
        raise ConfigError(_by_flag(str(error), given)) from None
    unset = [item for item in defaults if loaded.origins[item.partition("=")[0]] == "default"]
    return load_config(args.config, sets=[*unset, *sets]) if unset else loaded


def _by_flag(message: str, given: dict[str, tuple[str, str]]) -> str:
    """The refusal under the name that the user wrote."""
    if message.startswith("default:model.path: is empty"):
        return "name a model: a Hugging Face folder, a GGUF file or a hub name (or --config FILE)."
    for key, (written, _) in given.items():
        if message.startswith(f"--set:{key}: "):
            return f"{written.split(' ')[0]} ({key}): {message.removeprefix(f'--set:{key}: ')}"
    return message


def _written(flag: Flag, value: Any) -> str:
    if flag.kind == "switch":
        return ""
    words = value if isinstance(value, list) else [value]
    return " ".join("***" for _ in words) if flag.key == "server.api_keys" else " ".join(map(str, words))


def _text(flag: Flag, value: Any) -> str:
    """The value as `--set` reads it."""
    if flag.kind == "switch":
        return "true"
    if flag.kind == "values":
        return toml_value(tuple(value))
    if flag.name == "--log-level":
        return LOG_LEVELS.get(value, value)
    if flag.name == "--model-format":
        try:
            return checkpoint_format(value)
        except ConfigError as error:
            raise UsageError(f"--{str(error).replace('model_format', 'model-format')}") from None
    if flag.name == "--quant-policy":
        return str(QUANT_POLICIES.get(value, value))
    return str(value)


def _ssl(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    if not getattr(args, "flag_ssl", None):
        return {}
    missing = [name for name in ("SSL_KEYFILE", "SSL_CERTFILE") if not os.environ.get(name)]
    if missing:
        raise UsageError(f"--ssl: needs {' and '.join(missing)} in the environment, naming a PEM file each.")
    return {
        "server.ssl_keyfile": ("--ssl", os.environ["SSL_KEYFILE"]),
        "server.ssl_certfile": ("--ssl", os.environ["SSL_CERTFILE"]),
    }


def _chat_template(args: argparse.Namespace, loaded: LoadedConfig, fallback: str) -> tuple[str, str] | None:
    """(what was written, file): a built-in template is written to a file, so that a TOML file can name it too."""
    wanted = getattr(args, "flag_chat_template", None) or fallback
    capability, text = getattr(args, "flag_cap", None), getattr(args, "flag_meta_instruction", None)
    if capability in ("infilling", "python"):
        raise UsageError(f"--cap {capability}: is CodeLlama's way to fill in text, which is not supported; chat and completion are.")
    if capability == "completion":
        wanted = wanted or "base"
    if not wanted:
        if text is not None:
            raise UsageError(
                "--meta-instruction: needs --chat-template NAME; a checkpoint's own template takes its system text from messages."
            )
        return None
    from cli.templates import template_file

    written = "--chat-template " + wanted if getattr(args, "flag_chat_template", None) else f"chat template {wanted}"
    changes = {"meta_instruction": text, "capability": "completion" if capability == "completion" else None}
    return written, str(template_file(wanted, changes, Path(loaded.config.engine.kernel_cache_dir)))


def _lines(args: argparse.Namespace, given: dict[str, tuple[str, str]], loaded: LoadedConfig) -> Iterable[str]:
    """`--tp 2    engine.tp = 2` for every flag used."""
    width = max((len(written) for written, _ in given.values()), default=0)
    for key, (written, _) in given.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(loaded.config, section), name)
        shown = '["***"]' if KNOBS[section][name].secret else toml_value(value)
        yield f"{written.ljust(min(width, 44))}  {key} = {shown}"
    if getattr(args, "flag_backend", None) == "pytorch":
        yield "--backend pytorch: numbatch has one engine; it serves under both names"
    if "server.insecure" in given and not is_loopback(loaded.config.server.server_name):
        yield "no API key is asked for: everybody who reaches this machine can use the server (--api-keys changes that)"
