"""Who a terminal chat talks to: a model in this process, or a server over one of three protocols.

Each keeps (or lets the server keep) the conversation; `cli/terminal.py` knows them as `Partner`s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Self

from cli.arguments import say

if TYPE_CHECKING:
    from api.remote import APIClient
    from numbatch import Pipeline
    from text.lmdeploy_template import LMDeployTemplate

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given; greedy where none was."""
    given = {name: value for name in (*SAMPLING, "seed") if (value := getattr(args, name)) is not None}
    sampled = any(name in given for name in ("temperature", "top_p", "top_k"))
    return given if sampled else {"temperature": 0.0, **given}


class Conversation:
    """A partner that is told everything anew with each question. `say` gives the answer to messages, as it comes."""

    def __init__(self, say: Callable[[list[dict[str, str]]], Iterator[str]], system: str | None) -> None:
        self._say = say
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def reply(self, text: str) -> Iterator[str]:
        asked = [*self._messages, {"role": "user", "content": text}]
        said = ""
        try:
            with closing(self._say(asked)) as pieces:  # type: ignore[type-var]  # a generator, which Iterator does not say
                for piece in pieces:
                    said += piece
                    yield piece
        finally:
            if said:
                self._messages = [*asked, {"role": "assistant", "content": said}]

    def forget(self) -> None:
        self._messages = list(self._opening)


class InProcess(Conversation):
    """A model in this process. One without a chat template continues what is typed."""

    def __init__(self, pipe: Pipeline, args: argparse.Namespace) -> None:
        from numbatch import GenerationConfig

        given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
        config = GenerationConfig(max_new_tokens=args.max_tokens, random_seed=args.seed, **given)

        def say(messages: list[dict[str, str]]) -> Iterator[str]:
            prompt: Any = messages if pipe.model.loaded.template is not None else messages[-1]["content"]
            with closing(pipe.stream_infer(prompt, config)) as pieces:  # type: ignore[type-var]  # a generator
                for piece in pieces:
                    yield piece.text

        super().__init__(say, args.system)


class OverHttp(Conversation):
    """A server's /v1/chat/completions."""

    def __init__(self, client: APIClient, args: argparse.Namespace) -> None:
        fields = {**sampling(args), "max_tokens": args.max_tokens}
        super().__init__(lambda messages: client.chat(messages, **fields), args.system)


class InSession:
    """A server's /v1/chat/interactive: the server remembers, under a number, until it is told to end."""

    def __init__(self, client: APIClient, args: argparse.Namespace, session_id: int) -> None:
        self._client = client
        self._id = session_id
        self._fields = {**sampling(args), "request_output_len": args.max_tokens}
        self._system = args.system
        self._begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.forget()
        except (ValueError, RuntimeError, ConnectionError) as error:  # the server forgets by itself, later
            say(f"session {self._id} was not ended: {error}")

    def reply(self, text: str) -> Iterator[str]:
        prompt: Any = text
        if self._system and not self._begun:
            prompt = [{"role": "system", "content": self._system}, {"role": "user", "content": text}]
        self._begun = True
        pieces = self._client.chat_interactive_v1(prompt, self._id, True, True, **self._fields)
        with closing(pieces) as objects:  # type: ignore[type-var]  # a generator
            for piece in objects:
                yield piece["text"]

    def forget(self) -> None:
        if self._begun:
            self._begun = False
            list(self._client.chat_interactive_v1("", self._id, False, request_output_len=0))


class OverKServe:
    """A server's /v2/models/NAME/generate_stream, which knows no conversations: all that was said is sent as one text.

    Without a chat template the text goes on where the last answer ended; with one its markers stand around each turn
    (for servers that read markers in a prompt as control tokens; numbatch's own takes them as plain text).
    """

    def __init__(self, client: APIClient, args: argparse.Namespace, model: str, template: LMDeployTemplate | None) -> None:
        self._client = client
        self._path = f"/v2/models/{model}/generate_stream"
        self._parameters = {**sampling(args), "max_tokens": args.max_tokens}
        self._template = template
        self._chat = Conversation(self._say, args.system)

    def _say(self, messages: list[dict[str, str]]) -> Iterator[str]:
        given = {name: value for name, value in self._parameters.items() if value is not None}
        template = self._template
        text = template.render(messages, True) if template else "".join(message["content"] for message in messages)
        with closing(self._client.events(self._path, {"text_input": text, "parameters": given})) as objects:  # type: ignore[type-var]
            for piece in objects:
                yield piece["text_output"]

    def reply(self, text: str) -> Iterator[str]:
        return self._chat.reply(text)

    def forget(self) -> None:
        self._chat.forget()
