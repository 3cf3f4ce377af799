"""Chat messages to prompt ids, through the template of the checkpoint or the one that the configuration names.

Only templates produce control tokens: see `marks.py`. Jinja runs in a helper process (`template_host.py`), LMDeploy's
JSON format here (`lmdeploy_template.py`). `render` is synchronous and thread-safe; call it off the event loop.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from formats.errors import FormatError
from text.base import Tokenizer
from text.errors import NoChatTemplate, TemplateArgument, TemplateBudget, TemplateError, TemplateRefused, TextError
from text.hub_files import read_template_text
from text.lmdeploy_template import LMDeployTemplate, load_lmdeploy_template
from text.marks import Marks, Spellings
from text.template_host import TemplateHost
from text.template_names import template_named

log = logging.getLogger("numbatch.text")

# variables that the server sets; chat_template_kwargs may not
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "chat_template"})
DEFAULT, TOOL_USE = "default", "tool_use"
PROBE = "a probe of the chat template"
PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}}


class ChatTemplate:
    """One model's way to write a conversation.

    stop_strings: texts that end an answer (LMDeploy's `stop_words` that are no control tokens). stop_ids: control
    tokens that end an answer: what the template writes behind one, and stop words. They add to `tokenizer.eos_ids`.
    warnings: sentences for the log, about markers that the vocabulary does not have.
    """

    def __init__(self, tokenizer: Tokenizer, template: dict[str, str] | LMDeployTemplate, timeout_s: float, max_chars: int) -> None:
        """`template`: Jinja sources by name, or LMDeploy's markers."""
        self._tokenizer = tokenizer
        self._sources = {} if isinstance(template, LMDeployTemplate) else template
        self._renderer = template if isinstance(template, LMDeployTemplate) else TemplateHost(template, timeout_s, max_chars)
        self._spellings = Spellings(tokenizer)
        self._special_variables = _special_variables(tokenizer)
        words = template.stop_words if isinstance(template, LMDeployTemplate) else ()
        self.stop_strings = tuple(w for w in words if w not in tokenizer.specials)
        self.stop_ids = frozenset(tokenizer.specials[w].id for w in words if w in tokenizer.specials)
        self.warnings = tuple(template.warnings(tokenizer)) if isinstance(template, LMDeployTemplate) else ()

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Prompt ids. `messages`: OpenAI's, content a string or a list of text parts. `kwargs`: more variables for the
        template. `continue_final_message`: end with the text of the last message, so that the answer goes on from it.
        Raises TemplateRefused, TemplateArgument, TemplateBudget, Unencodable."""
        text, marks = self._marked_text(messages, tools, add_generation_prompt, kwargs, continue_final_message)
        tokenizer = self._tokenizer
        ids: list[int] = []
        first = True
        for part in tokenizer.split_specials(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += tokenizer.encode_segment(marks.remove(part), first=first)
            first = False
        bos = tokenizer.bos_id
        if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def render_text(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt as text, for people: in it a control token and a user's spelling of it look the same."""
        text, marks = self._marked_text(messages, tools, add_generation_prompt, kwargs)
        return marks.remove(text)

    def _marked_text(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        kwargs: dict[str, Any] | None,
        continue_final_message: bool = False,
    ) -> tuple[str, Marks]:
        for key in kwargs or {}:
            if key in RESERVED or not key.isidentifier():
                raise TemplateArgument(f"chat_template_kwargs.{key[:60]}: this variable cannot be set by a request")
        plain = [_plain_message(i, m) for i, m in enumerate(messages)]
        marks = Marks(self._spellings, self._sources.values(), [plain, tools, kwargs])
        marked = marks.messages(plain)
        if isinstance(self._renderer, LMDeployTemplate):
            _refuse_extras(tools, kwargs)
            text = self._renderer.render(marked, add_generation_prompt)
            return _cut_at_final(text, marked) if continue_final_message else text, marks
        variables = {
            **self._special_variables,
            **marks.value(kwargs or {}),
            "messages": marked,
            "tools": marks.value(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        name = TOOL_USE if tools and TOOL_USE in self._sources else DEFAULT
        text = _render_jinja(self._renderer, name, variables)
        return _cut_at_final(text, marked) if continue_final_message else text, marks

    def check(self) -> None:
        """Render a short conversation; learn what ends an answer. Raises TemplateError if the template cannot do it."""
        question = {"role": "user", "content": "Hello"}
        try:
            self.render([question])
        except TextError as e:
            self._check_with_tools(question, e)
        try:
            text, marks = self._marked_text([question, {"role": "assistant", "content": PROBE}], None, False, None)
        except TextError:
            return  # a template need not take answers as input
        _, found, behind = text.partition(PROBE)
        behind = marks.remove(behind).lstrip()
        match = self._tokenizer.special_pattern.match(behind) if found else None
        if match:
            self.stop_ids |= {self._tokenizer.specials[match.group()].id}

    def _check_with_tools(self, question: dict[str, Any], without: TextError) -> None:
        """Some checkpoints ship a template that only knows conversations with tools."""
        try:
            if isinstance(without, TemplateBudget):
                raise without
            self.render([question], tools=[PROBE_TOOL])
        except TextError:
            raise TemplateError(f"{without} (tried with one user message; set model.chat_template to a template that works)") from without

    def close(self) -> None:
        """End the helper process, if there is one; a later render would start another."""
        if isinstance(self._renderer, TemplateHost):
            self._renderer.close()


def _cut_at_final(text: str, messages: list[dict[str, Any]]) -> str:
    """The rendered text up to the end of the last message's content, with or without the spaces at its end."""
    content = messages[-1]["content"] if messages else ""
    bare = content.strip() if isinstance(content, str) else ""
    if not bare:
        raise TemplateRefused("continue_final_message: the last message is empty, so there is nothing to go on from")
    at = text.rfind(bare)
    if at < 0:
        raise TemplateRefused("continue_final_message: this model's chat template does not write the last message as it is")
    end = at + len(bare)
    spaces = content[len(content.rstrip()) :]
    return text[: end + len(spaces)] if text.startswith(spaces, end) else text[:end]


def _refuse_extras(tools: list[dict[str, Any]] | None, kwargs: dict[str, Any] | None) -> None:
    if tools:
        raise TemplateRefused("tools: this model's chat template (LMDeploy JSON) has no place for tools")
    for key in kwargs or {}:
        raise TemplateArgument(f"chat_template_kwargs.{key[:60]}: this model's chat template (LMDeploy JSON) takes no variables")


def _render_jinja(host: TemplateHost, name: str, variables: dict[str, Any]) -> str:
    try:
        return host.render(name, variables)
    except TemplateRefused:
        # OpenAI clients send `"content": null` beside tool calls, and many templates only know strings
        messages = variables["messages"]
        if not any(m.get("content", "") is None for m in messages):
            raise
        filled = [m | {"content": ""} if m.get("content", "") is None else m for m in messages]
        return host.render(name, variables | {"messages": filled})


def _special_variables(tokenizer: Tokenizer) -> dict[str, str]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    return {name: tokenizer.token_text(i) for name, i in ids.items() if i is not None}


def _plain_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """Content as one string, tool-call arguments as objects (OpenAI sends them as JSON text; templates want both)."""
    if not isinstance(message, dict):
        raise TemplateRefused(f"messages[{index}]: must be an object")
    message = dict(message)
    if isinstance(message.get("content"), list):
        message["content"] = "\n".join(_part_text(index, i, part) for i, part in enumerate(message["content"]))
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_parsed_call(call) for call in calls]
    return message


def _part_text(index: int, part_index: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise TemplateRefused(f"messages[{index}].content[{part_index}]: only parts of type text are supported")


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def load_chat_template(
    source: Path | str | None, tokenizer: Tokenizer, *, timeout_s: float = 2.0, max_chars: int = 8 << 20
) -> ChatTemplate:
    """`source`: a template file (.json: LMDeploy's format, else Jinja), Jinja text, or None/"" for the checkpoint's own.

    The template is tried before this returns; its helper process stays until `close`. Raises FormatError (a file that
    cannot be read), NoChatTemplate, TemplateError.
    """
    template = ChatTemplate(tokenizer, _load(source, tokenizer), timeout_s, max_chars)
    try:
        template.check()
    except BaseException:
        template.close()
        raise
    for warning in template.warnings:
        log.warning(warning)
    return template


def _load(source: Path | str | None, tokenizer: Tokenizer) -> dict[str, str] | LMDeployTemplate:
    if not source:
        built_in = template_named(tokenizer.template_name) if not tokenizer.chat_templates else None
        return built_in or _own_templates(tokenizer)
    if isinstance(source, str) and ("{{" in source or "{%" in source):
        return {DEFAULT: source}
    path = Path(source)
    if not path.is_file():
        raise FormatError(path.name, "", "model.chat_template names no file and is no Jinja text")
    if path.suffix.lower() == ".json":
        return load_lmdeploy_template(path)
    return {DEFAULT: read_template_text(path)}


def _own_templates(tokenizer: Tokenizer) -> dict[str, str]:
    templates = dict(tokenizer.chat_templates)
    if not templates:
        raise NoChatTemplate(
            "the checkpoint has no chat template; set model.chat_template to a Jinja or LMDeploy-JSON file to answer chat requests"
        )
    if DEFAULT not in templates:
        if len(templates) > 1:
            raise NoChatTemplate(f"the checkpoint has chat templates {sorted(templates)} and no default; set model.chat_template to a file")
        templates = {DEFAULT: next(iter(templates.values()))}
    return templates
