"""Logprobs as the protocols write them: OpenAI's entries and lists, vLLM's prompt_logprobs.

Knows tokens' texts through the tokenizer, and no endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.generate import MIN_LOGPROB, Choice, TokenLogprob
from engine.step import Logprobs
from text.tokenizer import Tokenizer

LOGPROB_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def entries(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Chat's: one object a token."""
    out = []
    for item in logprobs:
        top = [token_json(tokenizer, token, logprob) for token, logprob in item.top]
        out.append({**token_json(tokenizer, item.token_id, item.logprob), "top_logprobs": top})
    return out


def token_json(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"token": tokenizer.token_text(token), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}


def lists(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """Completions': four lists."""
    text = tokenizer.token_text
    tops = [{text(token): logprob for token, logprob in item.top} for item in logprobs]
    columns = ([text(item.token_id) for item in logprobs], [item.logprob for item in logprobs], tops, [item.offset for item in logprobs])
    return dict(zip(LOGPROB_LISTS, columns, strict=True))


def prompt_ids(choice: Choice) -> list[int]:
    sequence = choice.generation.sequence
    return sequence.token_ids[: sequence.num_prompt]


def prompt_lists(choice: Choice, tokenizer: Tokenizer, skip_special: bool) -> dict[str, list[Any]]:
    """The same four lists for the prompt of an echo; the first id has no logprob."""
    text = tokenizer.token_text
    tokens: list[str] = []
    offsets: list[int] = []
    at = 0
    for token in prompt_ids(choice):
        tokens.append(text(token))
        offsets.append(at)
        at += 0 if skip_special and token in tokenizer.special_ids else len(tokens[-1])
    found: list[Logprobs | None] = [None, *choice.prompt_logprobs]
    found += [None] * (len(tokens) - len(found))  # cancelled before the prompt was through
    tops = [v and {text(i): max(p, MIN_LOGPROB) for i, p in zip(v.top_ids, v.top_logprobs, strict=True)} for v in found]
    columns = (tokens, [v and max(v.logprob, MIN_LOGPROB) for v in found], tops, offsets)
    return dict(zip(LOGPROB_LISTS, columns, strict=True))


def prompt_logprobs_json(choice: Choice, tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's: for each prompt id an object by token id, with logprob, rank (1 = likeliest) and text; null for the first."""
    return [None, *(_by_id(token, value, tokenizer) for token, value in zip(prompt_ids(choice)[1:], choice.prompt_logprobs))]


def _by_id(token: int, value: Logprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    ranked = [(i, p, rank) for rank, (i, p) in enumerate(zip(value.top_ids, value.top_logprobs, strict=True), 1)]
    if token not in value.top_ids:
        ranked.insert(0, (token, value.logprob, value.rank + 1))
    return {str(i): {"logprob": max(p, MIN_LOGPROB), "rank": rank, "decoded_token": tokenizer.token_text(i)} for i, p, rank in ranked}
