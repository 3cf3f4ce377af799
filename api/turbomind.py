"""LMDeploy's first Python interface, over an engine in this process: `from numbatch import turbomind as tm`.

    model = tm.TurboMind.from_pretrained(path, model_name="internlm-chat-7b")
    generator = model.create_instance()
    ids = model.tokenizer.encode(model.model.get_prompt("Hello"))
    for outputs in generator.stream_infer(session_id=0, input_ids=[ids]):
        res, tokens = outputs[0]
    print(model.tokenizer.decode(res.tolist()))

A session's history is kept as ids and sent anew with each round: its K/V is found in the prefix cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from api.errors import ApiError
from api.local import LocalModel
from config.given import UNGUARDED, configured
from engine.sequence import FinishReason
from text.template_names import built_in_template

Output = list[tuple[np.ndarray, int]]


class Tokenizer:
    """Text to ids and back. `encode` believes control tokens written in the text: give it `get_prompt`'s, not a stranger's."""

    def __init__(self, local: LocalModel) -> None:
        self._tokenizer = local.loaded.tokenizer

    def encode(self, s: str, add_bos: bool = True) -> list[int]:
        """add_bos: put BOS first where the vocabulary asks for it and the text has none."""
        ids = self._tokenizer.encode(s, add_special=False, parse_special=True)
        bos = self._tokenizer.bos_id
        return [bos, *ids] if add_bos and self._tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def decode(self, t: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode([int(i) for i in t], skip_special=skip_special_tokens, continuation=True)


class Model:
    """The chat template."""

    def __init__(self, local: LocalModel) -> None:
        self._local = local

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        """A user's text as the model was trained to read it; sequence_start False: as a further round, without a system
        text. Without a template, the text itself."""
        template = self._local.loaded.template
        if template is None:
            return prompt
        question = {"role": "user", "content": prompt}
        if sequence_start:
            return template.render_text([question])
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        opening = template.render_text(before, add_generation_prompt=False)
        return template.render_text([*before, question]).removeprefix(opening)


class TurboMind:
    """A loaded model; `create_instance` gives what generates. Close it, or let the end of the program do so."""

    def __init__(self, local: LocalModel, scratch: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.local = local
        self.tokenizer = Tokenizer(local)
        self.model = Model(local)
        self.session_len = local.loaded.engine.session_len
        self._scratch = scratch
        self._histories: dict[int, list[int]] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, model_name: str | None = None, **knobs: Any) -> TurboMind:
        """`model_name` selects a chat template by its built-in name (internlm-chat-7b, qwen-7b, ...); any other name, and
        none, means the checkpoint's own. `knobs` are those of docs/config.md by name (tp=2, session_len=4096)."""
        scratch = None
        template = built_in_template(model_name) if model_name else None
        if template is not None and "chat_template" not in knobs:
            scratch = tempfile.TemporaryDirectory(prefix="numbatch-")
            knobs["chat_template"] = Path(scratch.name) / "chat_template.json"
            knobs["chat_template"].write_text(json.dumps({"model_name": template}), encoding="utf-8")
        try:
            loaded = configured(pretrained_model_name_or_path, defaults=UNGUARDED, model_name=model_name, **knobs)
            return cls(LocalModel(loaded.config), scratch)
        except BaseException:
            if scratch is not None:
                scratch.cleanup()
            raise

    def create_instance(self, cuda_stream_id: int = 0) -> TurboMindInstance:
        """`cuda_stream_id`: streams are the engine's own business; anything but 0 is refused."""
        if cuda_stream_id:
            raise ValueError("cuda_stream_id must be 0: the engine batches all instances on its own stream.")
        return TurboMindInstance(self)

    def close(self) -> None:
        self.local.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def history(self, session_id: int) -> list[int]:
        """Ids of the session so far; [] for one that has not begun."""
        return self._histories.setdefault(session_id, [])

    def forget(self, session_id: int) -> None:
        self._histories.pop(session_id, None)


class TurboMindInstance:
    """Generates for one caller at a time; instances of one model share its engine and its sessions."""

    def __init__(self, owner: TurboMind) -> None:
        self._owner = owner

    def stream_infer(
        self,
        session_id: int,
        input_ids: Sequence[Sequence[int]],
        request_output_len: int = 512,
        sequence_start: bool = True,
        sequence_end: bool = False,
        step: int = 0,
        stop: bool = False,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        random_seed: int | None = None,
        stream_output: bool = True,
    ) -> Iterator[Output]:
        """Yields [(ids of the answer so far, how many)], at least once; with stream_output = False only at the end.

        sequence_start: begin the session anew; else go on behind its history. sequence_end: forget it afterwards.
        step: keep only so many ids of the history (0: all). stop, and request_output_len = 0: generate nothing.
        One sequence at a time: `input_ids` holds one list.
        """
        if len(input_ids) != 1:
            raise ValueError(f"input_ids holds {len(input_ids)} sequences; give one (for batches there is numbatch.pipeline).")
        owner = self._owner
        if sequence_start:
            owner.forget(session_id)
        history = owner.history(session_id)
        if not 0 <= step <= len(history):
            raise ValueError(f"step is {step}, but the session has {len(history)} ids.")
        if step:
            del history[step:]
        if stop or request_output_len == 0:
            if sequence_end:
                owner.forget(session_id)
            yield [(np.zeros(0, np.int32), 0)]
            return
        prompt = [*history, *(int(i) for i in input_ids[0])]
        body = {
            "max_tokens": min(request_output_len, max(1, owner.session_len - len(prompt))),
            "top_p": top_p, "top_k": top_k, "temperature": temperature,
            "repetition_penalty": repetition_penalty, "ignore_eos": ignore_eos, "seed": random_seed,
        }  # fmt: skip
        answer: list[int] = []
        try:
            for answer in owner.local.iterate(lambda: _ids(owner.local, prompt, body)):
                if stream_output:
                    yield [(np.array(answer, np.int32), len(answer))]
            if not stream_output:
                yield [(np.array(answer, np.int32), len(answer))]
        finally:
            if sequence_end:
                owner.forget(session_id)
            else:
                history[:] = [*prompt, *answer]


async def _ids(local: LocalModel, prompt: list[int], body: dict[str, Any]) -> AsyncGenerator[list[int], None]:
    """Cumulative ids without the token that ended the answer; at least once."""
    answer = await local.submit(prompt, body, logprobs=-1, default_tokens=body["max_tokens"])
    ids: list[int] = []
    try:
        generation = answer.choices[0].generation
        reason = None
        while reason is None:
            for event in await generation.next():
                reason = event.finish_reason
                if reason in (FinishReason.ABORT, FinishReason.ERROR):
                    raise ApiError(503, "The engine ended this answer before it was complete.")
                if event.token_id >= 0 and reason is not FinishReason.STOP:
                    ids.append(event.token_id)
            yield list(ids)
    finally:
        local.service.finished(answer)
