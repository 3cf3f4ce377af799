"""Names of LMDeploy's built-in chat templates, as its commands and configurations spell them, and what they mean here.

A name selects markers (`text/lmdeploy_template.py`) and nothing else: `qwen-7b` is Qwen's markers for whatever model.
"""

from __future__ import annotations

from typing import Any

from text.lmdeploy_template import BUILT_IN, LMDeployTemplate

ALIASES = {
    "internlm-chat": "internlm",
    "internlm-chat-7b": "internlm",
    "internlm-chat-7b-8k": "internlm",
    "internlm-chat-20b": "internlm",
    "internlm-7b": "base",
    "internlm-20b": "base",
    "internlm2-chat": "internlm2",
    "internlm2-1_8b": "internlm2",
    "internlm2-7b": "internlm2",
    "internlm2-20b": "internlm2",
    "internlm2-chat-1_8b": "internlm2",
    "internlm2-chat-7b": "internlm2",
    "internlm2-chat-20b": "internlm2",
    "qwen-7b": "qwen",
    "qwen-14b": "qwen",
    "qwen-7b-chat": "qwen",
    "qwen-14b-chat": "qwen",
    "llama": "base",
    "llama-7b": "base",
    "llama-2": "llama2",
    "llama-2-chat": "llama2",
    "mixtral": "mistral",
    "baichuan2-7b": "base",
    "baichuan2-7b-chat": "baichuan2",
}


def built_in_template(name: str) -> str | None:
    """The key of BUILT_IN that `name` (a template's or a model's, with or without its owner) means; None if none."""
    plain = name.rstrip("/").rpartition("/")[2].lower()
    plain = ALIASES.get(plain, plain)
    return plain if plain in BUILT_IN else None


def template_named(name: str) -> LMDeployTemplate | None:
    """The built-in template that `name` means; None if none."""
    found = built_in_template(name)
    if found is None:
        return None
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in BUILT_IN[found].items()}
    return LMDeployTemplate(**values)


def known_names() -> dict[str, tuple[str, ...]]:
    """Built-in template -> the other names it goes by."""
    return {name: tuple(sorted(alias for alias, target in ALIASES.items() if target == name)) for name in BUILT_IN}
