"""What the sampler must compute, in plain numpy and float64, slow and obvious.

`engine/sampler.py` differs only by rounding: its weights are float32 exponentials in units of 2**-43.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.sequence import SamplingParams
from engine.step import BAD_LOGITS, NOTHING_LEFT, Logprobs


def sample_reference(
    logits: np.ndarray, params: SamplingParams, token_ids: Sequence[int], num_prompt: int, eos_token_ids: Sequence[int] = ()
) -> tuple[int, Logprobs | None]:
    """The id that follows `token_ids` (prompt, then answer), and its logprobs where asked for; logits [vocab]."""
    probabilities = reference_distribution(logits, params, token_ids, num_prompt, eos_token_ids)
    if probabilities is None:
        usable = np.isfinite(logits.max())  # NaN and +inf are the maximum
        edited = reference_edits(logits, params, token_ids, num_prompt, eos_token_ids)
        chooses = params.allowed_token_ids or params.bad_words
        return NOTHING_LEFT if usable and chooses and np.isneginf(edited).all() else BAD_LOGITS, None
    token = reference_draw(probabilities, params.seed, len(token_ids))
    return token, reference_logprobs(logits, token, params.logprobs) if params.logprobs >= 0 else None


def reference_distribution(
    logits: np.ndarray, params: SamplingParams, token_ids: Sequence[int], num_prompt: int, eos_token_ids: Sequence[int] = ()
) -> np.ndarray | None:
    """float64 [vocab]: the probability of each id after every edit and filter; None where the row cannot be sampled."""
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return None
    x = reference_edits(logits, params, token_ids, num_prompt, eos_token_ids)
    if np.isposinf(x).any() or np.isneginf(x).all():
        return None
    order = np.lexsort((np.arange(len(x)), -x))  # by falling logit, then by rising id
    if params.greedy:
        return np.eye(len(x))[order[0]]
    p = np.exp((x - x.max()) / params.temperature)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.top_p < 1.0:
        before = np.cumsum(p[order]) - p[order]  # of ids ahead in the order
        p[order[1:][before[1:] >= params.top_p]] = 0  # the id that crosses top_p stays, and so does the first
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def reference_edits(
    logits: np.ndarray, params: SamplingParams, token_ids: Sequence[int], num_prompt: int, eos_token_ids: Sequence[int] = ()
) -> np.ndarray:
    """float64 [vocab]: the logits after logit_bias, penalties and masks."""
    x = logits.astype(np.float64)
    for token, addend in params.logit_bias:
        x[token] += addend
    answer = list(token_ids[num_prompt:])
    for token in set(token_ids):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(answer):
        x[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    if len(answer) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)):
            x[token] = -np.inf
    if params.allowed_token_ids:
        x[[token for token in range(len(x)) if token not in params.allowed_token_ids]] = -np.inf
    for word in params.bad_words:
        if answer[len(answer) - len(word) + 1 :] == list(word[:-1]) and len(answer) >= len(word) - 1:
            x[word[-1]] = -np.inf
    return x


def reference_draw(probabilities: np.ndarray, seed: int, position: int) -> int:
    """The first id, rising, at which the running probability exceeds the uniform number of (seed, position)."""
    running = np.cumsum(probabilities)
    return int(np.searchsorted(running, uniform_reference(seed, position) * running[-1], side="right"))


def uniform_reference(seed: int, position: int) -> float:
    low, _ = philox_reference((position, 0), seed)
    return low / 2**64


def philox_reference(counter: tuple[int, int], key: int) -> tuple[int, int]:
    """Philox4x32-10 on Python integers: counter of two 64-bit words (low, high), 64-bit key -> two words (low, high)."""
    word = 0xFFFFFFFF
    c = [counter[0] & word, counter[0] >> 32, counter[1] & word, counter[1] >> 32]
    k0, k1 = key & word, key >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & word, (a >> 32) ^ c[3] ^ k1, a & word]
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c[0] | c[1] << 32, c[2] | c[3] << 32


def reference_logprobs(logits: np.ndarray, token: int, k: int) -> Logprobs:
    x = logits.astype(np.float64)
    logprobs = x - x.max() - np.log(np.exp(x - x.max()).sum())
    order = np.lexsort((np.arange(len(x)), -x))
    top = [int(i) for i in order[:k] if np.isfinite(x[i])]
    rank = int(np.flatnonzero(order == token)[0])
    return Logprobs(float(logprobs[token]), rank, tuple(top), tuple(float(logprobs[i]) for i in top))
