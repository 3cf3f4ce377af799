"""The Python API: `from numbatch import pipeline, serve, client, GenerationConfig, ChatTemplateConfig, turbomind`.

    with pipeline("path/to/model") as pipe:
        print(pipe("Hello").text)

`pipeline` runs a model in this process, without a port; `serve` starts a server of its own and returns its client;
`client` talks to one that runs. Names, arguments and results are LMDeploy's, so that its scripts need only another
import. Every call may be made from plain code, from threads and from notebooks. Importing this loads nothing heavy.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import tempfile
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from config.errors import ConfigError
from config.given import UNGUARDED, configured
from config.load import LoadedConfig
from config.version import VERSION as __version__

if TYPE_CHECKING:
    from api.local import LocalModel
    from api.remote import APIClient, RunningServer

__all__ = [
    # and turbomind, which is loaded when it is asked for
    "ChatTemplateConfig", "EngineConfig", "GenerationConfig", "Pipeline", "PytorchEngineConfig", "Response", "Session",
    "TurbomindEngineConfig", "__version__", "client", "pipeline", "serve",
]  # fmt: skip

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, ids, or the messages of a conversation
DEFAULT_NEW_TOKENS = 512  # LMDeploy's; fewer where the context holds no more


def __getattr__(name: str) -> Any:
    """`turbomind` is a module with LMDeploy's first interface, `TurboMind.from_pretrained`; loaded when asked for."""
    if name == "turbomind":
        import api.turbomind

        return api.turbomind
    raise AttributeError(f"module 'numbatch' has no attribute {name!r}")


# --- what the caller says ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How answers are made. Without temperature, top_p, top_k or min_p (and without do_sample) the answer is greedy.

    `max_new_tokens` None: 512, or what the context still holds. Where it samples, what is not given has LMDeploy's
    value: temperature 0.8, top_k 50, top_p 1. `logprobs` k: the logprob of each token and of the k likeliest.
    """

    n: int = 1
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def body(self, *, chat: bool) -> dict[str, Any]:
        """As fields of a request; `ValueError` where fields contradict each other."""
        if self.n != 1:
            raise ValueError(f"n must be 1, not {self.n}: give the prompt {self.n} times; what it shares is computed once.")
        drawn: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = [name for name, value in drawn.items() if value is not None]
        if self.do_sample is False and given and self.temperature != 0:
            raise ValueError(f"do_sample = False is greedy, where {given[0]} means nothing: leave one of them out.")
        if self.do_sample or (self.do_sample is None and given):
            drawn = {"temperature": 0.8, "top_k": 50} | {name: drawn[name] for name in given}
        else:
            drawn = {"temperature": 0.0}
        fields = {
            **drawn,
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "ignore_eos": self.ignore_eos,
            "seed": self.random_seed,
            "stop": [self.stop_words] if isinstance(self.stop_words, str) else _listed(self.stop_words),
            "stop_token_ids": _listed(self.stop_token_ids),
            "bad_words": [self.bad_words] if isinstance(self.bad_words, str) else _listed(self.bad_words),
            "allowed_token_ids": _listed(self.allowed_token_ids),
            "logit_bias": None if self.logit_bias is None else {str(i): addend for i, addend in self.logit_bias.items()},
            "skip_special_tokens": self.skip_special_tokens,
            "include_stop_str_in_output": self.include_stop_str_in_output,
        }
        if chat and self.chat_template_kwargs is not None:
            fields["chat_template_kwargs"] = dict(self.chat_template_kwargs)
        return {name: value for name, value in fields.items() if value is not None}


# fields of a request -> what GenerationConfig calls them
CALLED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "random_seed", "stop": "stop_words"}


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


@dataclass(frozen=True, slots=True)
class ChatTemplateConfig:
    """LMDeploy's chat template: markers around each kind of text. Keys left out come from the built-in of `model_name`."""

    model_name: str = ""
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    tool: str | None = None
    eotool: str | None = None
    separator: str | None = None
    capability: str | None = None
    stop_words: Sequence[str] | None = None

    @classmethod
    def from_json(cls, file_or_string: str | Path) -> ChatTemplateConfig:
        """From a file, or from the JSON itself. An unknown key is a `ValueError` that names the known ones."""
        text = str(file_or_string)
        if not text.lstrip().startswith("{"):
            text = Path(file_or_string).read_text(encoding="utf-8")
        try:
            given = json.loads(text)
        except ValueError as error:
            what = "The chat template" if text is file_or_string else file_or_string
            raise ValueError(f"{what}: is no JSON: {error}.") from None
        if not isinstance(given, dict):
            raise ValueError("A chat template is a JSON object with the keys of ChatTemplateConfig.")
        given.pop("model_path", None)  # LMDeploy writes it; it chooses nothing
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"A chat template has no key {str(key)[:60]!r}; it has {', '.join(known)}.")
        return cls(**given)

    def to_json(self, file_path: str | Path | None = None) -> str:
        """As JSON text, written to `file_path` too if one is given; the aliases of built-in names are resolved."""
        from text.template_names import built_in_template

        given = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        given["model_name"] = built_in_template(self.model_name) or self.model_name
        text = json.dumps(given, ensure_ascii=False, indent=2) + "\n"
        if file_path is not None:
            Path(file_path).write_text(text, encoding="utf-8")
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """LMDeploy's engine settings under LMDeploy's names; None leaves a knob at its default. Any other knob of
    docs/config.md can be given to `pipeline` and `serve` by its name."""

    tp: int | None = None
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float | None = None
    cache_block_seq_len: int | None = None
    enable_prefix_caching: bool | None = None
    quant_policy: int | str | None = None
    rope_scaling_factor: float | None = None
    use_logn_attn: bool | None = None
    model_format: str | None = None
    dtype: str | None = None
    max_prefill_token_num: int | None = None
    num_tokens_per_iter: int | None = None
    download_dir: str | None = None
    revision: str | None = None

    def knobs(self) -> dict[str, Any]:
        """name -> value of what was given, under the names of docs/config.md."""
        given = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}
        if tokens := given.pop("num_tokens_per_iter", None):
            given["max_prefill_token_num"] = tokens
        return given


TurbomindEngineConfig = PytorchEngineConfig = EngineConfig  # there is one engine


@dataclass(slots=True)
class Response:
    """An answer, or while it streams a piece of it (then `text` and `token_ids` are the new ones, the counts so far)."""

    text: str
    generate_token_len: int
    input_token_len: int
    finish_reason: Literal["stop", "length"] | None = None  # None: there is more to come
    token_ids: list[int] = field(default_factory=list)  # the token that ended the answer included
    logprobs: list[dict[int, float]] | None = None  # one dict a token: id -> logprob, the token itself and the likeliest
    index: int = 0  # of the prompt

    def extend(self, piece: Response) -> None:
        """Append a piece that streamed in."""
        self.text += piece.text
        self.generate_token_len, self.finish_reason = piece.generate_token_len, piece.finish_reason
        self.token_ids += piece.token_ids
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs


# --- a model in this process ------------------------------------------------------------------------------


class Session:
    """A conversation: what was said, sent anew with each question (its cached prefix is not computed again)."""

    def __init__(self, pipe: Pipeline, gen_config: GenerationConfig | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        self.response: Response | None = None  # the last answer, as far as it came
        self._pipe = pipe
        self._generation = gen_config

    def ask(self, prompt: str, gen_config: GenerationConfig | None = None) -> Response:
        """One question; the answer is remembered."""
        for _ in self.stream(prompt, gen_config):
            pass
        if self.response is None:
            raise RuntimeError("The model gave no answer.")
        return self.response

    def stream(self, prompt: str, gen_config: GenerationConfig | None = None) -> Iterator[Response]:
        """The answer as it comes; leaving early ends it, and what came is remembered."""
        asked = [*self.messages, {"role": "user", "content": prompt}]
        self.response = None
        try:
            for piece in self._pipe.stream_infer(asked, gen_config or self._generation):
                if self.response is None:
                    self.response = dataclasses.replace(piece, token_ids=list(piece.token_ids))
                else:
                    self.response.extend(piece)
                yield piece
        finally:
            if self.response is not None:
                self.messages = [*asked, {"role": "assistant", "content": self.response.text}]


class Pipeline:
    """One model, loaded here. Use as a context manager, or call `close`."""

    def __init__(self, loaded: LoadedConfig, scratch: tempfile.TemporaryDirectory[str] | None = None) -> None:
        """`scratch` is removed by `close`. `pipeline()` is the usual way to make one."""
        from api.local import LocalModel

        self._scratch = scratch
        self.model: LocalModel = LocalModel(loaded.config)
        self.tokenizer = self.model.loaded.tokenizer
        self.config = loaded.config
        self._window = 2 * max(1, self.model.loaded.engine.config.engine.max_batch_size)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def __call__(self, prompts: str, gen_config: GenerationConfig | None = ..., *, do_preprocess: bool = ...) -> Response: ...
    @overload
    def __call__(self, prompts: Any, gen_config: Any = ..., *, do_preprocess: bool = ...) -> Any: ...
    def __call__(
        self, prompts: Any, gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None, *, do_preprocess: bool = True
    ) -> Response | list[Response]:
        """Answer a prompt, or a list of them together. A prompt is a text, the messages of a conversation, or ids.

        A text is asked as a user's message through the chat template; with do_preprocess = False, and where the model
        has no template, it is continued as it is. ids always are.
        """
        single, many = _prompt_list(prompts)
        configs = _per_prompt(gen_config, len(many))
        responses = self.model.run(lambda: self._all(many, configs, do_preprocess))
        return responses[0] if single else responses

    infer = batch_infer = __call__

    def stream_infer(
        self, prompts: Any, gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None, *, do_preprocess: bool = True
    ) -> Iterator[Response]:
        """The same as pieces, of all prompts as they come; `index` tells whose. Leaving early ends what still runs."""
        _, many = _prompt_list(prompts)
        configs = _per_prompt(gen_config, len(many))
        return self.model.iterate(lambda: self._pieces(many, configs, do_preprocess))

    def chat(
        self, prompt: str, session: Session | None = None, gen_config: GenerationConfig | None = None, stream_response: bool = False
    ) -> Any:
        """One round of a conversation: the session, its `response` filled in; with stream_response an iterator of pieces."""
        session = session or self.session()
        if stream_response:
            return session.stream(prompt, gen_config)
        session.ask(prompt, gen_config)
        return session

    def get_ppl(self, input_ids: Any) -> list[float]:
        """How well the model predicts a text or ids (or each of several): mean cross entropy in nats, as LMDeploy's
        get_ppl and POST /get_ppl give it; `math.exp` of it is the perplexity. No chat template is applied."""
        _, many = _prompt_list(input_ids)

        async def losses() -> list[float]:
            window = asyncio.Semaphore(self._window)

            async def one(prompt: Any) -> float:
                async with window:
                    return await self.model.loss(prompt)

            return list(await asyncio.gather(*(one(prompt) for prompt in many)))

        return self.model.run(losses)

    def session(self, gen_config: GenerationConfig | None = None) -> Session:
        """An empty conversation."""
        return Session(self, gen_config)

    def close(self) -> None:
        """End the engine; idempotent."""
        self.model.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    async def _all(self, prompts: list[Prompt], configs: list[GenerationConfig], templated: bool) -> list[Response]:
        answers: list[Response | None] = [None] * len(prompts)
        async with aclosing(self._pieces(prompts, configs, templated)) as pieces:
            async for piece in pieces:
                answer = answers[piece.index]
                if answer is None:
                    answers[piece.index] = piece
                else:
                    answer.extend(piece)
        return [answer for answer in answers if answer is not None]

    async def _pieces(self, prompts: list[Prompt], configs: list[GenerationConfig], templated: bool) -> AsyncGenerator[Response, None]:
        """Of all prompts at once; a window of them is with the engine at a time."""
        arrived: asyncio.Queue[Response | BaseException | None] = asyncio.Queue()
        window = asyncio.Semaphore(self._window)

        async def answer(index: int) -> None:
            try:
                async with window, aclosing(self._one(index, prompts[index], configs[index], templated)) as pieces:
                    async for piece in pieces:
                        arrived.put_nowait(piece)
                arrived.put_nowait(None)
            except BaseException as error:  # carried over to the generator's consumer
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(answer(index)) for index in range(len(prompts))]
        left = len(tasks)
        try:
            while left:
                piece = await arrived.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, index: int, prompt: Prompt, config: GenerationConfig, templated: bool) -> AsyncGenerator[Response, None]:
        if isinstance(prompt, str) and templated and self.model.loaded.template is not None:
            prompt = [{"role": "user", "content": prompt}]
        from api.errors import ApiError, bad

        chat = bool(prompt) and isinstance(prompt[0], Mapping)
        wanted = -1 if config.logprobs is None else config.logprobs
        try:
            answer = await self.model.submit(prompt, config.body(chat=chat), logprobs=wanted, default_tokens=DEFAULT_NEW_TOKENS)
        except ApiError as error:  # under the names that the caller wrote
            if error.param not in CALLED:
                raise
            raise bad(error.param, str(error).replace(error.param, CALLED[error.param]), error.code) from None
        taken = 0
        try:
            choice = answer.choices[0]
            sequence = choice.generation.sequence
            async for batch in answer.deltas():
                for delta in batch:
                    ids = sequence.token_ids[sequence.num_prompt + taken : sequence.num_prompt + choice.num_generated]
                    taken = choice.num_generated
                    logprobs = [{item.token_id: item.logprob, **dict(item.top)} for item in delta.logprobs]
                    reason: Any = delta.finish_reason
                    yield Response(delta.text, taken, sequence.num_prompt, reason, ids, logprobs if wanted >= 0 else None, index)
        finally:
            self.model.service.finished(answer)


def _prompt_list(prompts: Any) -> tuple[bool, list[Prompt]]:
    """(whether it is one prompt, all of them)."""
    if isinstance(prompts, str):
        return True, [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"A prompt is a text, a list of messages or a list of ids, not {type(prompts).__name__}.")
    prompts = list(prompts)
    if any(isinstance(item, tuple) for item in prompts):
        raise ValueError("A prompt is text: images and other media come in a later version.")
    one = bool(prompts) and isinstance(prompts[0], Mapping | int)
    return one, [prompts] if one else prompts


def _per_prompt(gen_config: GenerationConfig | Sequence[GenerationConfig] | None, count: int) -> list[GenerationConfig]:
    if gen_config is None or isinstance(gen_config, GenerationConfig):
        return [gen_config or GenerationConfig()] * count
    if isinstance(gen_config, Mapping) or not all(isinstance(config, GenerationConfig) for config in gen_config):
        raise ValueError("gen_config must be a GenerationConfig, or a list with one for each prompt.")
    if len(gen_config) != count:
        raise ValueError(f"There are {count} prompts and {len(gen_config)} GenerationConfigs; give one, or one for each.")
    return list(gen_config)


def pipeline(
    model_path: str | Path = "",
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    *,
    config: str | Path | None = None,
    log_level: str = "WARNING",
    **knobs: Any,
) -> Pipeline:
    """Load a model here. `model_path`: a Hugging Face folder, a GGUF file or a hub name; `config`: a TOML file as the
    server's; `knobs`: any key of docs/config.md by its name (tp=2, session_len=4096, device="cpu").

    Raises ConfigError (a ValueError), ModelError, FormatError or DeviceError.
    """
    logging.getLogger("numbatch").setLevel(log_level)
    scratch = _write_template(chat_template_config, knobs)
    try:
        loaded = configured(model_path, config=config, defaults=UNGUARDED, **_settings(backend_config), **knobs)
        return Pipeline(loaded, scratch)
    except BaseException:
        if scratch is not None:
            scratch.cleanup()
        raise


def _settings(engine: EngineConfig | None) -> dict[str, Any]:
    return engine.knobs() if engine is not None else {}


def _write_template(template: ChatTemplateConfig | None, knobs: dict[str, Any]) -> tempfile.TemporaryDirectory[str] | None:
    """The template as a file, which `knobs` then names."""
    if template is None:
        return None
    if knobs.get("chat_template"):
        raise ConfigError("chat_template: is given twice, also as chat_template_config; leave one out.")
    scratch = tempfile.TemporaryDirectory(prefix="numbatch-")
    knobs["chat_template"] = Path(scratch.name) / "chat_template.json"
    template.to_json(knobs["chat_template"])
    return scratch


# --- a model behind a port --------------------------------------------------------------------------------


def serve(
    model_path: str | Path = "",
    model_name: str | None = None,
    backend: Literal["turbomind", "pytorch"] = "turbomind",
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    server_name: str = "127.0.0.1",
    server_port: int = 23333,
    log_level: str = "WARNING",
    api_keys: str | Sequence[str] | None = None,
    *,
    config: str | Path | None = None,
    **knobs: Any,
) -> RunningServer:
    """Start a server in a process of its own, wait until it is ready, and return its client (port 0: a free one).

    `close` it, or use it as a context manager. A script that ends without having done so stays until the server is
    stopped (Ctrl-C), so that a script whose last line is `serve(...)` serves.
    Raises ConfigError before anything starts, RuntimeError if the server ends before it is ready.
    """
    from api.remote import RunningServer

    if backend not in ("turbomind", "pytorch"):
        raise ConfigError(f"backend: must be turbomind or pytorch (both mean numbatch's own engine), not {backend!r}.")
    keys = [api_keys] if isinstance(api_keys, str) else list(api_keys or ())
    scratch = _write_template(chat_template_config, knobs)
    try:
        given = {"model_name": model_name, "server_name": server_name, "server_port": server_port, "log_level": log_level, **knobs}
        loaded = configured(model_path, config=config, **_settings(backend_config), api_keys=keys or None, **given)
        return RunningServer(loaded.config, scratch)
    except BaseException:
        if scratch is not None:
            scratch.cleanup()
        raise


def client(api_server_url: str = "http://127.0.0.1:23333", api_key: str | None = None) -> APIClient:
    """A client of a server that runs. `api_key`: one of its server.api_keys."""
    from api.remote import APIClient

    return APIClient(api_server_url, api_key)


if __name__ == "__main__":
    raise SystemExit("This module is the Python API; the command is `numbatch`, or `python -m cli.main` where it is not installed.")
