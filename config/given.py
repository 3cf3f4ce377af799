"""A configuration from values that a program gives by name (`tp=2, session_len=4096`), over a file and the environment.

What the Python API and the command line share: knobs by their bare names, and LMDeploy's spellings of values that
are written differently here. Every value goes through the same checks as `--set`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.errors import ConfigError
from config.load import LoadedConfig, all_knobs, load_config, toml_value

# What guards a server against its callers would only get in the way of a program that calls itself.
UNGUARDED: dict[str, Any] = {
    "admission.max_requests": 1 << 20,
    "admission.max_requests_per_key": 1 << 20,
    "admission.max_queue_age_s": 3600.0,
    "admission.max_queue_tokens": 1 << 40,
}
QUANT_POLICIES = {"none": 0, "int4": 4, "int8": 8}


def configured(
    model_path: str | Path = "", *, config: str | Path | None = None, defaults: Mapping[str, Any] | None = None, **knobs: Any
) -> LoadedConfig:
    """The checked configuration: `knobs` (None: not given), then the environment, the TOML file `config`, then `defaults`
    (by section.key), then the schema's. Raises ConfigError."""
    given = {name: value for name, value in knobs.items() if value is not None}
    if "model_format" in given:
        given["model_format"] = checkpoint_format(given["model_format"])
    if "quant_policy" in given:
        given["quant_policy"] = QUANT_POLICIES.get(given["quant_policy"], given["quant_policy"])
    if model_path:
        given["model.path"] = str(model_path)
    file = None if config is None else Path(config)
    try:
        loaded = load_config(file, sets=knob_texts(given))
    except ConfigError as error:
        raise ConfigError(_as_called(str(error))) from None
    unset = {key: value for key, value in (defaults or {}).items() if loaded.origins[key] == "default"}
    return load_config(file, sets=knob_texts({**unset, **given})) if unset else loaded


def _as_called(message: str) -> str:
    """A refusal of a call names no command line: `engine.tp: must be ...`, not `--set:engine.tp: must be ...`."""
    if message.startswith("default:model.path: is empty"):
        return "model_path: is empty; name a Hugging Face folder, a GGUF file or a hub name."
    return message.removeprefix("--set:")


def knob_texts(knobs: Mapping[str, Any]) -> list[str]:
    """`section.key=value` of each knob, given by its name or as section.key; ConfigError names the nearest one."""
    homes: dict[str, list[str]] = {}
    for knob in all_knobs():
        homes.setdefault(knob.name, []).append(knob.key)
        homes[knob.key] = [knob.key]
    texts = []
    for name, value in knobs.items():
        keys = homes.get(name, [])
        if len(keys) > 1:
            raise ConfigError(f"{name}: is a key of several sections ({', '.join(keys)}); name one of them as a whole.")
        if not keys:
            near = difflib.get_close_matches(name, homes, 1)
            raise ConfigError(f"{name}: is no knob" + (f"; did you mean {near[0]}?" if near else "; docs/config.md lists them."))
        value = tuple(str(item) for item in value) if isinstance(value, list | tuple) else value
        texts.append(f"{keys[0]}={value if isinstance(value, str | Path) else toml_value(value)}")
    return texts


def checkpoint_format(name: str) -> str:
    """LMDeploy's `model_format` as the knob's value: the format is read from the files, and a name may only agree."""
    name = name.lower()
    if name == "llama":
        raise ConfigError(
            "model_format: Meta's consolidated.*.pth are pickles, which numbatch does not read; use the model's "
            "Hugging Face folder (safetensors) or a GGUF file."
        )
    return name
