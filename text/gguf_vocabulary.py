"""The `tokenizer.*` keys of a GGUF file, checked: lengths equal, ids in range, types known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from formats.errors import FormatError, printable
from formats.gguf import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """`add_bos` and `add_space_prefix` are None where the file does not say."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    unk_id: int | None
    add_bos: bool | None
    add_space_prefix: bool | None
    chat_templates: dict[str, str]


def read_vocabulary(file: GGUFFile) -> GGUFVocabulary:
    """Raises FormatError naming the key."""
    keys = _Keys(file)
    tokens = keys.strings("tokens")
    if not tokens:
        keys.fail("tokens", "missing or empty; the file holds no vocabulary")
    n = len(tokens)
    types = keys.numbers("token_type", n, NORMAL)
    if not all(NORMAL <= t <= BYTE for t in types):
        keys.fail("token_type", f"a type outside {NORMAL} to {BYTE}")
    scores = keys.numbers("scores", n, 0.0)
    if not all(map(math.isfinite, scores)):
        keys.fail("scores", "a score is not finite")
    model = keys.value("model", str)
    is_spm = model == "llama"
    ends = [keys.token_id(key, n) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    if is_spm and ends[0] is None and n > 2:
        ends[0] = 2
    bos = keys.token_id("bos_token_id", n)
    return GGUFVocabulary(
        model=model or "",
        pre=keys.value("pre", str) or "default",
        tokens=tokens,
        types=[int(t) for t in types],
        scores=scores,
        merges=keys.strings("merges"),
        bos_id=1 if bos is None and is_spm and n > 1 else bos,
        eos_id=ends[0],
        eos_ids=frozenset(e for e in ends if e is not None),
        unk_id=keys.token_id("unknown_token_id", n),
        add_bos=keys.value("add_bos_token", bool),
        add_space_prefix=keys.value("add_space_prefix", bool),
        chat_templates=_templates(file),
    )


def _templates(file: GGUFFile) -> dict[str, str]:
    """`tokenizer.chat_template` is the default one; `tokenizer.chat_template.NAME` others."""
    found = {}
    for key, value in file.metadata.items():
        if key == TEMPLATE_KEY or key.startswith(TEMPLATE_KEY + "."):
            if not isinstance(value, str):
                raise FormatError(file.path.name, key, "is not a string")
            found[key[len(TEMPLATE_KEY) + 1 :] or "default"] = value
    return found


class _Keys:
    """Typed reads of `tokenizer.ggml.*`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def fail(self, key: str, reason: str) -> NoReturn:
        raise FormatError(self.file.path.name, f"tokenizer.ggml.{key}", reason)

    def value(self, key: str, kind: type) -> Any:
        value = self.file.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and type(value) is not kind:
            self.fail(key, f"{printable(str(value))} is not a {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.file.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            if isinstance(value, np.ndarray) and value.size == 0:
                return []
            self.fail(key, "is not a list of strings")
        return value

    def numbers(self, key: str, n: int, default: float) -> list[Any]:
        value = self.file.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return [default] * n
        if not isinstance(value, np.ndarray) or value.ndim != 1 or len(value) != n:
            self.fail(key, f"is not a list of {n} numbers, one for each token")
        return list(value.tolist())

    def token_id(self, key: str, n: int) -> int | None:
        value: int | None = self.value(key, int)
        if value is None or value == 0xFFFFFFFF:  # written for "none"
            return None
        if not 0 <= value < n:
            self.fail(key, f"{value} is not an id of this vocabulary of {n}")
        return value
