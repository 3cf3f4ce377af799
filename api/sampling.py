"""The one choke point between a request and the engine's `SamplingParams`.

`shared_fields` is the table of what chat and text completions have in common; `read` turns parsed values into a
`Wanted` that holds only finite, exact, bounded values; `params` makes the engine's parameters of one choice.

Seeds: choice i of a prompt is sampled with `(seed + i * SEED_STRIDE) mod 2**64`, so choice 0 of `n = 4` equals the
only choice of `n = 1`; without a seed each request draws a random one.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from api.errors import ApiError, bad, no_such_model
from api.schema import (
    Field,
    Table,
    boolean,
    check_int,
    check_list,
    check_number,
    choice,
    integer,
    kind,
    nested,
    number,
    pattern,
    string,
    table,
    unsupported,
    wrong_type,
)
from config.schema import Request
from engine.sequence import MAX_SEED, SamplingParams

SEED_STRIDE = 0x9E37_79B9_7F4A_7C15  # 2**64 / golden ratio, odd: every choice gets another seed
MAX_PRIORITY = 1000
MAX_METADATA = 16
MAX_SESSION_ID = (1 << 63) - 1
MAX_BAD_WORDS = 128
REQUEST_NAME = "[A-Za-z0-9._-]{1,64}"
LATER = "comes in a later version."
NOT_SUPPORTED = {  # what other servers know: refused by name, whatever the value
    "structured_outputs": f"structured output {LATER}",
    "guided_json": f"structured output {LATER}",
    "guided_regex": f"structured output {LATER}",
    "guided_choice": f"structured output {LATER}",
    "guided_grammar": f"structured output {LATER}",
    "grammar": f"structured output {LATER}",
    "json_schema": f"structured output {LATER}",
    "regex": f"structured output {LATER}",
    "ebnf": f"structured output {LATER}",
    "adapter_name": f"LoRA adapters {LATER}",
    "lora_path": f"LoRA adapters {LATER}",
    "use_beam_search": "answers are sampled; n gives several.",
    "length_penalty": "answers are sampled; n gives several.",
    "logits_processors": "no code is taken from requests; see logit_bias, bad_words and allowed_token_ids.",
    "prompt_embeds": "prompts are text or token ids.",
    "kv_transfer_params": "prompt and answer are computed by the same server.",
    "mm_processor_kwargs": "this server reads text only.",
    "media_io_kwargs": "this server reads text only.",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the answers of one request are made; strings stay in `api/`."""

    n: int
    max_tokens: int | None  # None: the endpoint's default
    seed: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special: bool
    logprobs: int  # -1: none
    priority: int
    cache_salt: str
    stream: bool
    include_usage: bool
    continuous_usage: bool  # in every chunk
    prompt_logprobs: int  # -1: none
    values: dict[str, Any]

    def params(self, max_tokens: int, index: int) -> SamplingParams:
        """Of choice `index`; raises `BadParameter` where fields contradict each other (min_tokens > max_tokens)."""
        v = self.values
        # all choices of a prompt have the same prompt logprobs; chunks of a stream cannot wait for those of another choice
        scored = self.prompt_logprobs if index == 0 or self.stream else -1
        return SamplingParams(
            max_tokens=max(max_tokens, 1),
            min_tokens=v["min_tokens"],
            temperature=v["temperature"],
            top_k=max(v["top_k"], 0),
            top_p=v["top_p"],
            min_p=v["min_p"],
            repetition_penalty=v["repetition_penalty"],
            presence_penalty=v["presence_penalty"],
            frequency_penalty=v["frequency_penalty"],
            logit_bias=v["logit_bias"],
            stop_token_ids=v["stop_token_ids"],
            ignore_eos=v["ignore_eos"],
            seed=(self.seed + index * SEED_STRIDE) & MAX_SEED,
            logprobs=self.logprobs,
            allowed_token_ids=v["allowed_token_ids"],
            bad_words=v["bad_words"],
            prompt_logprobs=scored,
        )


def shared_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> list[Field]:
    """What /v1/chat/completions and /v1/completions have in common."""
    most = session_len - 1
    return [
        Field("model", "Name of the served model; may be left out.", {"type": "string", "enum": [model]}, _model(model)),
        integer("max_tokens", 1, most, "Most ids to generate; prompt and answer together must fit into the context."),
        integer("min_tokens", 0, most, "End-of-sequence and stop conditions are ignored until this many ids are generated.", 0),
        integer("min_new_tokens", 0, most, "LMDeploy's name of min_tokens."),
        number("temperature", 0, 2, "0 is greedy.", 1.0),
        number("top_p", 0, 1, "Keep the most likely ids whose probabilities sum to this.", 1.0),
        integer("top_k", -1, (1 << 31) - 1, "Keep this many most likely ids; 0 and -1 switch it off.", 0),
        number("min_p", 0, 1, "Drop ids less likely than this share of the most likely one.", 0.0),
        number("repetition_penalty", 0.01, 100, "Divides (multiplies, if negative) the logits of ids in prompt and answer.", 1.0),
        number("presence_penalty", -2, 2, "Subtracted from the logits of ids that are in the answer.", 0.0),
        number("frequency_penalty", -2, 2, "Subtracted from logits, times the id's occurrences in the answer.", 0.0),
        _logit_bias(limits.max_logit_bias, vocab_size),
        _stop(limits),
        _stop_token_ids(limits.max_stop_token_ids, vocab_size),
        _allowed_token_ids(vocab_size),
        _bad_words(limits.max_stop_bytes),
        boolean("ignore_eos", "Go on after an end-of-sequence id."),
        integer("seed", 0, MAX_SEED, "Same seed, same answer, whatever else runs; choice i uses seed + i * 0x9E3779B97F4A7C15 mod 2^64."),
        integer("n", 1, limits.max_n, "Answers for each prompt.", 1),
        boolean("skip_special_tokens", "Leave special tokens out of the text.", True),
        boolean("include_stop_str_in_output", "Keep the stop string (or stop token) that ended the answer in its text."),
        integer("prompt_logprobs", 0, limits.max_top_logprobs, "Logprobs of the prompt's ids and of this many likeliest; not in a stream."),
        integer("truncate_prompt_tokens", -1, most, "Keep only the last so many ids of the prompt; -1: as many as fit."),
        boolean("return_token_ids", "Also give the ids of prompt and answer."),
        pattern("request_id", REQUEST_NAME, "A name for /abort_request; the X-Request-Id and the answer's id do as well."),
        integer("priority", -MAX_PRIORITY, MAX_PRIORITY, "Smaller goes first.", 0),
        session_field("Keep the K/V of prompt and answer for the next request with this number; one prompt, n = 1."),
        string("user_id", 512, "Whose request it is, for QoS (admission.qos_config_path); without QoS it has no effect.", ""),
        number("timeout", 0.001, 86400, "Seconds after which an answer that is not complete is given up: 504."),
        string("cache_salt", limits.max_salt_chars, "Requests share cached prefixes only with the same salt (and API key).", ""),
        boolean("stream", "Answer with server-sent events."),
        nested("stream_options", _stream_options(), "Only with stream = true."),
        string("user", 512, "Accepted; has no effect."),
        string("safety_identifier", 512, "Accepted; has no effect."),
        string("prompt_cache_key", 512, "Accepted; has no effect: cached prefixes are found by what they hold."),
        choice("prompt_cache_retention", ("in_memory", "24h"), "Accepted; has no effect: prefixes stay cached while there is room."),
        _metadata(),
        boolean("store", "Accepted; nothing is stored."),
        choice("service_tier", ("auto", "default"), "Accepted; there is one tier."),
        unsupported("spaces_between_special_tokens", "text is as the tokenizer decodes it.", (True,), {"const": True, "type": "boolean"}),
        *(unsupported(name, why) for name, why in NOT_SUPPORTED.items()),
    ]  # fmt: skip


def _stream_options() -> Table:
    return table([
        boolean("include_usage", "One more chunk, with the usage."),
        boolean("continuous_usage_stats", "The usage so far in every chunk."),
        unsupported("include_obfuscation", "chunks carry no padding.", (False,), {"const": False, "type": "boolean"}),
    ])  # fmt: skip


def read(values: dict[str, Any], logprobs: int, prompt_logprobs: int | None = None) -> Wanted:
    """From the parsed fields of an endpoint; `prompt_logprobs` where it is not the field's value."""
    if values["stream_options"] is not None and not values["stream"]:
        raise bad("stream_options", "stream_options is only allowed with stream = true.", "invalid_value")
    old, new = values["min_new_tokens"], values["min_tokens"]
    if old is not None and new not in (0, old):
        raise bad("min_new_tokens", "min_new_tokens and min_tokens differ; give one of them.", "invalid_value")
    values = {**values, "min_tokens": new if old is None else old}
    if values["max_tokens"] is not None and values["min_tokens"] > max(values["max_tokens"], 1):
        message = f"min_tokens is {values['min_tokens']}, more than max_tokens, which is {values['max_tokens']}."
        raise bad("min_tokens", message, "invalid_value")
    if values["prompt_logprobs"] is not None:
        if values["stream"]:
            raise bad("prompt_logprobs", "prompt_logprobs are not given in a stream; leave stream out.", "invalid_value")
        prompt_logprobs = values["prompt_logprobs"]
    seed = values["seed"]
    options = values["stream_options"] or {}
    return Wanted(
        n=values["n"],
        max_tokens=values["max_tokens"],
        seed=secrets.randbits(64) if seed is None else seed,
        stop=values["stop"],
        include_stop=values["include_stop_str_in_output"],
        skip_special=values["skip_special_tokens"],
        logprobs=logprobs,
        priority=values["priority"],
        cache_salt=values["cache_salt"],
        stream=values["stream"],
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
        prompt_logprobs=-1 if prompt_logprobs is None else prompt_logprobs,
        values=values,
    )


def room_for_answer(wanted: Wanted, num_prompt: int, session_len: int, default: int | None, param: str) -> int:
    """`max_tokens` of this prompt: what was asked for, else the default, else the rest of the context."""
    room = session_len - num_prompt
    if room < 1:
        raise too_long(param, f"{num_prompt} tokens", session_len)
    if wanted.max_tokens is None:
        most = room if default is None else min(default, room)
        if (least := wanted.values["min_tokens"]) > most:
            raise bad("min_tokens", f"min_tokens is {least}, but this answer has at most {most} tokens.", "invalid_value")
        return most
    if max(wanted.max_tokens, 1) > room:
        message = (
            f"The prompt has {num_prompt} tokens and max_tokens asks for {wanted.max_tokens} more, "
            f"but a sequence holds at most {session_len}; shorten one of them."
        )
        raise bad("max_tokens", message, "context_length_exceeded")
    return wanted.max_tokens


def too_long(param: str, size: str, session_len: int) -> ApiError:
    message = f"The prompt has {size}, but prompt and answer together hold at most {session_len} tokens; shorten the prompt."
    return bad(param, message, "context_length_exceeded")


# -- fields with a shape of their own ----------------------------------------------------------------------


def _model(served: str) -> Any:
    def parse(name: str, value: Any) -> str:
        if type(value) is not str:
            raise wrong_type(name, "a string", value)
        if value != served:
            raise no_such_model(value, served)
        return value

    return parse


def session_field(doc: str) -> Field:
    """A conversation's number among those of its API key."""

    def parse(name: str, value: Any) -> int:
        if check_int(name, value, -1, MAX_SESSION_ID) == 0:
            raise bad(name, f"{name} must be at least 1, or -1 for none.", "invalid_value")
        return int(value)

    schema = {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1, "maximum": MAX_SESSION_ID}]}
    return Field("session_id", doc, schema, parse, -1)


def model_field(served: str) -> Field:
    return Field("model", "Name of the served model; may be left out.", {"type": "string", "enum": [served]}, _model(served))


def _stop(limits: Request) -> Field:
    most, size = limits.max_stop_strings, limits.max_stop_bytes

    def parse(name: str, value: Any) -> tuple[str, ...]:
        if type(value) is not str and type(value) is not list:
            raise wrong_type(name, "a string or an array of strings", value)
        stops = check_list(name, [value] if type(value) is str else value, most)
        for stop in stops:
            if type(stop) is not str:
                raise wrong_type(name, "a string or an array of strings", stop)
            if not stop:
                raise bad(name, f"{name} holds an empty string, which would end every answer at once.", "invalid_value")
            if len(stop) > size or len(stop.encode()) > size:
                raise bad(name, f"{name} holds a string longer than {size} bytes.", "string_above_max_length")
        return tuple(dict.fromkeys(stops))

    one = {"type": "string", "minLength": 1, "maxLength": size}  # bytes, which a schema cannot count
    schema = {"anyOf": [one, {"type": "array", "items": one, "maxItems": most}]}
    return Field("stop", f"Up to {most} strings, each at most {size} bytes of UTF-8, that end the answer.", schema, parse, ())


def _stop_token_ids(most: int, vocab_size: int) -> Field:
    def parse(name: str, value: Any) -> tuple[int, ...]:
        return tuple(dict.fromkeys(check_int(name, item, 0, vocab_size - 1) for item in check_list(name, value, most)))

    items = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    schema = {"type": "array", "items": items, "maxItems": most}
    return Field("stop_token_ids", "Ids that end the answer, beside the model's own.", schema, parse, ())


def _allowed_token_ids(vocab_size: int) -> Field:
    def parse(name: str, value: Any) -> tuple[int, ...]:
        allowed = tuple(dict.fromkeys(check_int(name, item, 0, vocab_size - 1) for item in check_list(name, value, vocab_size)))
        if not allowed:
            raise bad(name, f"{name} is empty: no id could follow.", "invalid_value")
        return allowed

    items = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    schema = {"type": "array", "items": items, "minItems": 1, "maxItems": vocab_size}
    return Field("allowed_token_ids", "Only these ids may be generated.", schema, parse, ())


def _bad_words(size: int) -> Field:
    def parse(name: str, value: Any) -> tuple[str, ...]:
        words = check_list(name, value, MAX_BAD_WORDS)
        for word in words:
            if type(word) is not str:
                raise wrong_type(name, "an array of strings", word)
            if not word.strip() or len(word.encode()) > size:
                raise bad(name, f"{name} holds a word that is blank or longer than {size} bytes.", "invalid_value")
        return tuple(dict.fromkeys(words))

    word = {"type": "string", "minLength": 1, "maxLength": size, "pattern": r"\S"}
    schema = {"type": "array", "items": word, "maxItems": MAX_BAD_WORDS}
    doc = "Words that the answer may not hold, as the tokenizer writes them at its beginning, within a word and after a space."
    return Field("bad_words", doc, schema, parse, ())


def truncated(ids: list[int], values: dict[str, Any], session_len: int) -> list[int]:
    """The end of a prompt, as truncate_prompt_tokens asks."""
    keep = values["truncate_prompt_tokens"]
    if keep is None:
        return ids
    if keep == 0:
        raise bad("truncate_prompt_tokens", "truncate_prompt_tokens must be -1 or at least 1.", "invalid_value")
    if keep < 0:
        keep = max(1, session_len - max(values["max_tokens"] or 1, 1))
    return ids[-keep:]


def _logit_bias(most: int, vocab_size: int) -> Field:
    def parse(name: str, value: Any) -> tuple[tuple[int, float], ...]:
        if type(value) is not dict:
            raise wrong_type(name, "an object", value)
        if len(value) > most:
            raise bad(name, f"{name} has {len(value)} entries; at most {most} are allowed.", "object_above_max_properties")
        biases = {}
        for key, addend in value.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
                message = f"{name} has the key {key[:32]!r}; keys are token ids between 0 and {vocab_size - 1}."
                raise bad(name, message, "invalid_value")
            try:
                biases[int(key)] = check_number(f"{name}.{key}", addend, -100, 100)
            except ApiError as error:
                raise bad(name, str(error), error.code) from None
        if len(biases) != len(value):
            raise bad(name, f"{name} names an id twice.", "invalid_value")
        return tuple(biases.items())

    addends = {"type": "number", "minimum": -100, "maximum": 100}
    keys = {"pattern": "^(0|[1-9][0-9]{0,9})$"}
    schema = {"type": "object", "additionalProperties": addends, "propertyNames": keys, "maxProperties": most}
    return Field("logit_bias", "Token id (as a string) to a number added to its logit.", schema, parse, ())


def _metadata() -> Field:
    def parse(name: str, value: Any) -> dict[str, str]:
        if type(value) is not dict:
            raise wrong_type(name, "an object", value)
        if len(value) > MAX_METADATA:
            raise bad(name, f"{name} has {len(value)} entries; at most {MAX_METADATA} are allowed.", "object_above_max_properties")
        for key, item in value.items():
            if type(item) is not str:
                raise bad(name, f"{name}.{key[:64]} must be a string, not {kind(item)}.", "invalid_type")
        return value

    schema = {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": MAX_METADATA}
    return Field("metadata", "Accepted; has no effect.", schema, parse)
