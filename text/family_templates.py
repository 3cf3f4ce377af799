"""Old families whose checkpoints say nothing of their chat template: which built-in one is theirs, and their control tokens.

Their own code wrote the conversation; it is never run. What is known of each is here, by the architecture in
config.json. A base model has no template: its files show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FamilyText:
    """`template`: a key of BUILT_IN. `controls`: pieces of the vocabulary that only templates may write."""

    template: str
    controls: tuple[str, ...]
    only_if: str = ""  # a key of generation_config.json that chat models have and base models have not
    unless: tuple[str, str] = ("", "")  # a key of it and its value in base models


ARCHITECTURES = {
    "InternLMForCausalLM": FamilyText("internlm", ("<eoh>", "<eoa>")),
    "InternLM2ForCausalLM": FamilyText("internlm2", ("<|im_start|>", "<|im_end|>")),
    "QWenLMHeadModel": FamilyText("qwen", ("<|im_start|>", "<|im_end|>"), unless=("chat_format", "raw")),
    "BaichuanForCausalLM": FamilyText("baichuan2", ("<reserved_106>", "<reserved_107>"), only_if="user_token_id"),
}


def family_text(config: Mapping[str, object], generation: Mapping[str, object]) -> FamilyText | None:
    """What is known of a checkpoint with these two files; None for other families and base models."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    known = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if known is None or known.only_if and known.only_if not in generation:
        return None
    key, value = known.unless
    return None if key and generation.get(key) == value else known
