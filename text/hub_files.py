"""What the small JSON files of a Hugging Face directory say about its tokenizer: special tokens, BOS, EOS, templates.

`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `generation_config.json`, `config.json` and
`chat_template.*`, each optional, each checked. Later sources only fill what earlier ones left open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formats.errors import FormatError, printable
from formats.json_file import read_json
from text.family_templates import FamilyText, family_text

MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKEN_ID = 1 << 24


@dataclass(frozen=True, slots=True)
class DeclaredToken:
    """One entry of `added_tokens_decoder`."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass(slots=True)
class HubSettings:
    """`add_bos` and `legacy` are None where no file says."""

    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    add_bos: bool | None = None
    legacy: bool | None = None
    declared_eos_ids: frozenset[int] = frozenset()
    added_tokens: dict[int, DeclaredToken] = field(default_factory=dict)
    chat_templates: dict[str, str] = field(default_factory=dict)
    family: FamilyText | None = None

    def eos_ids(self, vocab: dict[str, int], vocab_size: int) -> frozenset[int]:
        """Ids that end an answer: generation_config.json's (or config.json's) and the tokenizer's own `eos_token`."""
        ids = {i for i in self.declared_eos_ids if i < vocab_size}
        if self.eos_token in vocab:
            ids.add(vocab[self.eos_token])
        return frozenset(ids)


def read_hub_settings(directory: Path) -> HubSettings:
    """Everything in `directory` that is there. Raises FormatError naming file and key."""
    settings = HubSettings()
    _read_tokenizer_config(directory / "tokenizer_config.json", settings)
    _read_special_tokens_map(directory / "special_tokens_map.json", settings)
    _read_added_tokens(directory / "added_tokens.json", settings)
    for name in ("generation_config.json", "config.json"):
        if not settings.declared_eos_ids:
            settings.declared_eos_ids = _read_eos_ids(directory / name)
    settings.chat_templates |= _read_template_files(directory)
    settings.family = family_text(*(_read_if_there(directory / name) for name in ("config.json", "generation_config.json")))
    return settings


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_template_text(path: Path) -> str:
    """A template file as text. Raises FormatError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise FormatError(path.name, "", f"larger than {MAX_TEMPLATE_BYTES} bytes")
        return data.decode("utf-8")
    except OSError as e:
        raise FormatError(path.name, "", e.strerror or str(e)) from e
    except UnicodeDecodeError as e:
        raise FormatError(path.name, "", "is not UTF-8") from e


def _token(file: str, key: str, value: Any) -> str | None:
    """A special token is written as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise FormatError(file, key, "is neither a string nor an object with a string `content`")
    return value


def _read_tokenizer_config(path: Path, settings: HubSettings) -> None:
    if not path.is_file():
        return
    config = read_json(path)
    for key in ("bos_token", "eos_token", "unk_token"):
        setattr(settings, key, _token(path.name, key, config.get(key)))
    for key, name in (("add_bos_token", "add_bos"), ("legacy", "legacy")):
        if isinstance(config.get(key), bool):
            setattr(settings, name, config[key])
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise FormatError(path.name, "added_tokens_decoder", "is not an object")
    for key, value in added.items():
        settings.added_tokens[_token_id(path.name, key)] = _declared(path.name, key, value)
    settings.chat_templates |= _config_templates(path.name, config.get("chat_template"))


def _token_id(file: str, text: Any) -> int:
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10:
        text = int(text)
    if type(text) is not int or not 0 <= text < MAX_TOKEN_ID:
        raise FormatError(file, printable(str(text)), f"is not a token id below {MAX_TOKEN_ID}")
    return text


def _declared(file: str, key: str, value: Any) -> DeclaredToken:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise FormatError(file, f"added_tokens_decoder.{printable(key)}", "is not an object with a string `content`")
    return DeclaredToken(value["content"], *(value.get(k) is True for k in ("special", "lstrip", "rstrip")))


def _config_templates(file: str, value: Any) -> dict[str, str]:
    """`chat_template` is one string, or a list of objects with `name` and `template`."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        raise FormatError(file, "chat_template", "is neither a string nor a list")
    found = {}
    for entry in value:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not isinstance(entry.get("template"), str):
            raise FormatError(file, "chat_template", "an entry of the list has no string `name` and `template`")
        found[entry["name"]] = entry["template"]
    return found


def _read_special_tokens_map(path: Path, settings: HubSettings) -> None:
    if path.is_file():
        config = read_json(path)
        for key in ("bos_token", "eos_token", "unk_token"):
            if getattr(settings, key) is None:
                setattr(settings, key, _token(path.name, key, config.get(key)))


def _read_added_tokens(path: Path, settings: HubSettings) -> None:
    """The older form: content -> id. Those in `added_tokens_decoder` are known better."""
    if path.is_file():
        for content, token_id in read_json(path).items():
            settings.added_tokens.setdefault(_token_id(path.name, token_id), DeclaredToken(content, special=True))


def _read_eos_ids(path: Path) -> frozenset[int]:
    if not path.is_file():
        return frozenset()
    value = read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return frozenset(_token_id(path.name, i) for i in ids if i is not None)


def _read_template_files(directory: Path) -> dict[str, str]:
    """`chat_template.jinja`, `chat_template.json` and `additional_chat_templates/*.jinja`."""
    found = {}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))[:64]:
        found[path.stem] = read_template_text(path)
    if (directory / "chat_template.json").is_file():
        found |= _config_templates("chat_template.json", read_json(directory / "chat_template.json").get("chat_template"))
    if (directory / "chat_template.jinja").is_file():
        found["default"] = read_template_text(directory / "chat_template.jinja")
    return found
