"""The folder that LMDeploy 0.1's `convert` made: where things lie in it, and its config.ini, read defensively.

    triton_models/weights/config.ini     28 keys under [llama], and beside it one raw file a tensor and rank
    triton_models/tokenizer/             the checkpoint's tokenizer and small JSON files

`engine` takes settings and weights from here, `text` the tokenizer and the template's name; this knows neither.
"""

from __future__ import annotations

import configparser
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.errors import FormatError, printable
from formats.files import open_regular

WEIGHTS = Path("triton_models") / "weights"
TOKENIZER = Path("triton_models") / "tokenizer"
CONFIG = "config.ini"
SECTION = "llama"
MAX_CONFIG_BYTES = 1 << 16

Value = str | int | float
# Every key with its type, in the order of the file.
KEYS: dict[str, type] = {
    "model_name": str,
    "tensor_para_size": int,
    "head_num": int,
    "kv_head_num": int,
    "vocab_size": int,
    "num_layer": int,
    "inter_size": int,
    "norm_eps": float,
    "attn_bias": int,
    "start_id": int,
    "end_id": int,
    "session_len": int,
    "weight_type": str,
    "rotary_embedding": int,
    "rope_theta": float,
    "size_per_head": int,
    "group_size": int,
    "max_batch_size": int,
    "max_context_token_num": int,
    "step_length": int,
    "cache_max_entry_count": float,
    "cache_block_seq_len": int,
    "cache_chunk_size": int,
    "use_context_fmha": int,
    "quant_policy": int,
    "max_position_embeddings": int,
    "rope_scaling_factor": float,
    "use_logn_attn": int,
}
KNOWN_ONCE = {
    "use_dynamic_ntk": "it is of a LMDeploy before 0.1; convert the checkpoint again",
    "rope_scaling_type": "it is of a LMDeploy after 0.2; serve the checkpoint itself",
    "model_arch": "it is of a LMDeploy after 0.2; serve the checkpoint itself",
    "num_tokens_per_iter": "it is of a LMDeploy after 0.1; convert the checkpoint again, or serve it itself",
    "expert_num": "a mixture of experts is not supported",
}


@dataclass(frozen=True, slots=True)
class Workspace:
    """`settings` has exactly the keys of KEYS, each of its type."""

    path: Path
    settings: Mapping[str, Value]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    def integer(self, key: str) -> int:
        return int(self.settings[key])

    def number(self, key: str) -> float:
        return float(self.settings[key])

    def text(self, key: str) -> str:
        return str(self.settings[key])


def is_workspace(path: Path) -> bool:
    """Whether `path` is the top of such a folder."""
    return (path / WEIGHTS / CONFIG).is_file()


def read_workspace(path: Path) -> Workspace:
    """Raises FormatError naming config.ini and the key."""
    return Workspace(path, parse_settings(_read(path / WEIGHTS / CONFIG)))


def parse_settings(text: str) -> dict[str, Value]:
    """The settings in the text of a config.ini."""
    parser = configparser.RawConfigParser(strict=True, empty_lines_in_values=False, default_section="")
    try:
        parser.read_string(text, CONFIG)
    except configparser.Error as e:
        raise FormatError(CONFIG, "", printable(" ".join(str(e).split()))) from e
    if parser.sections() != [SECTION]:
        raise FormatError(CONFIG, "", f"wants one section, [{SECTION}]; it has {printable(str(parser.sections()))}")
    given = dict(parser[SECTION])
    for key in given.keys() - KEYS.keys():
        raise FormatError(CONFIG, printable(key), KNOWN_ONCE.get(key, "not a key of LMDeploy 0.1's config.ini"))
    for key in KEYS:
        if key not in given:
            raise FormatError(CONFIG, key, "missing; all 28 keys are needed")
    return {key: _value(key, given[key], kind) for key, kind in KEYS.items()}


def settings_text(settings: Mapping[str, Value]) -> str:
    """The text of a config.ini with these settings, keys in their order."""
    return "\n".join([f"[{SECTION}]", *(f"{key} = {settings[key]}" for key in KEYS)]) + "\n\n"


def _read(path: Path) -> str:
    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as e:
        raise FormatError(path.name, "", e.strerror or str(e)) from e
    if len(data) > MAX_CONFIG_BYTES:
        raise FormatError(path.name, "", f"larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FormatError(path.name, "", "is not UTF-8") from e


def _value(key: str, text: str, kind: type) -> Value:
    if kind is str:
        return text
    try:
        number = int(text) if kind is int else float(text)
    except ValueError as e:
        raise FormatError(CONFIG, key, f"{printable(text)!r} is not {'an integer' if kind is int else 'a number'}") from e
    if not math.isfinite(number) or abs(number) > 1e15:
        raise FormatError(CONFIG, key, f"{printable(text)!r} is out of range")
    return number
