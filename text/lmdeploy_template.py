"""LMDeploy's JSON chat templates: markers around each kind of text, as data. No template language, so no sandbox.

    {system}{meta_instruction}{eosys}{user}{content}{eoh}{assistant}{content}{eoa}{separator}{user}{content}{eoh}{assistant}

A system message of the request takes the place of `meta_instruction`; without either nothing of the first three is
written. `separator` stands between rounds only. An answer at the very end is continued. Keys that the file leaves out
come from the built-in template that `model_name` names, if it names one.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from formats.errors import FormatError, printable
from formats.json_file import read_json
from text.base import Tokenizer
from text.errors import TemplateRefused

_CHATML = {
    "system": "<|im_start|>system\n",
    "eosys": "<|im_end|>\n",
    "user": "<|im_start|>user\n",
    "eoh": "<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "eoa": "<|im_end|>",
    "separator": "\n",
    "stop_words": ["<|im_end|>"],
}
BUILT_IN: dict[str, dict[str, Any]] = {
    "base": {"capability": "completion"},
    "internlm": {"user": "<|User|>:", "eoh": "\n", "assistant": "<|Bot|>:", "eoa": "<eoa>", "separator": "\n", "stop_words": ["<eoa>"]},
    "internlm2": _CHATML | {"stop_words": ["<|im_end|>", "<|action_end|>"]},
    "qwen": _CHATML | {"meta_instruction": "You are a helpful assistant."},
    "llama2": {
        "system": "[INST] <<SYS>>\n",
        "eosys": "\n<</SYS>>\n\n",
        "user": "[INST] ",
        "eoh": " [/INST] ",
        "eoa": " </s><s>",
    },
    "llama3": {
        "system": "<|start_header_id|>system<|end_header_id|>\n\n",
        "eosys": "<|eot_id|>",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n",
        "eoh": "<|eot_id|>",
        "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "eoa": "<|eot_id|>",
        "stop_words": ["<|eot_id|>", "<|end_of_text|>"],
    },
    "mistral": {"user": "[INST] ", "eoh": " [/INST]", "eoa": "</s>"},
    "baichuan2": {"user": "<reserved_106>", "assistant": "<reserved_107>"},
    "vicuna": {"user": "USER: ", "eoh": " ", "assistant": "ASSISTANT: ", "eoa": "</s>", "eosys": " "},
}
IGNORED_KEYS = {"model_name", "model_path"}  # they choose the template and say nothing about its text


@dataclass(frozen=True, slots=True)
class LMDeployTemplate:
    """The markers; field names are the keys of the file."""

    system: str = ""
    meta_instruction: str = ""
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    tool: str = ""
    eotool: str = ""
    separator: str = ""
    capability: str = "chat"
    stop_words: tuple[str, ...] = ()

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt. Raises TemplateRefused for roles that the format has no markers for."""
        if self.capability == "completion":
            return "".join(_content(i, m) for i, m in enumerate(messages))
        parts: list[str] = []
        if self.meta_instruction and not any(m.get("role") == "system" for m in messages):
            parts += [self.system, self.meta_instruction, self.eosys]
        around = {"system": (self.system, self.eosys), "user": (self.user, self.eoh), "assistant": (self.assistant, self.eoa)}
        around["tool"] = (self.tool, self.eotool)
        for i, message in enumerate(messages):
            role = message.get("role")
            if role not in around:
                raise TemplateRefused(f"messages[{i}].role: the chat template knows {', '.join(around)}, not {role!r}")
            begin, end = around[role]
            last = i == len(messages) - 1
            text = _content(i, message)
            if role == "assistant":
                if last and add_generation_prompt:
                    return "".join([*parts, begin, text])  # goes on with this answer
                end += "" if last else self.separator
            if role != "system" or text:
                parts += [begin, text, end]
        return "".join([*parts, self.assistant if add_generation_prompt else ""])

    def warnings(self, tokenizer: Tokenizer) -> list[str]:
        """A sentence for each `<tag>` in a marker that is not one token of this vocabulary: usually a typing error."""
        known = list(tokenizer.specials)
        found = []
        for f in fields(self):
            value = getattr(self, f.name)
            for text in value if isinstance(value, tuple) else [value]:
                for tag in re.findall(r"<[^<>\s]+>", text) if f.name != "meta_instruction" else []:
                    if len(tokenizer.encode_segment(tag, first=False)) == 1 or tag in tokenizer.specials:
                        continue
                    near = difflib.get_close_matches(tag, known, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    found.append(f"chat template: {tag!r} in `{f.name}` is not a special token of this vocabulary{hint}")
        return found


def _content(index: int, message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TemplateRefused(f"messages[{index}].content: must be text")
    return content


def load_lmdeploy_template(path: Path) -> LMDeployTemplate:
    """Raises FormatError naming file and key."""
    given = read_json(path)
    name = given.get("model_name", "")
    if not isinstance(name, str):
        raise FormatError(path.name, "model_name", "is not a string")
    values = {**BUILT_IN.get(name, {}), **{k: v for k, v in given.items() if k not in IGNORED_KEYS}}
    if name and not values:
        near = difflib.get_close_matches(name, BUILT_IN, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; built in are {', '.join(BUILT_IN)}"
        raise FormatError(path.name, "model_name", f"{printable(name)!r} is no built-in template, and the file has no markers{hint}")
    known = {f.name for f in fields(LMDeployTemplate)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise FormatError(path.name, printable(key), "unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
        values[key] = _checked(path.name, key, value)
    if values.get("capability", "chat") not in ("chat", "completion"):
        raise FormatError(path.name, "capability", f"{printable(values['capability'])} is not supported; chat and completion are")
    return LMDeployTemplate(**values)


def _checked(file: str, key: str, value: Any) -> Any:
    if value is None:
        return () if key == "stop_words" else ""
    if key == "stop_words":
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise FormatError(file, key, "is not a list of non-empty strings")
        return tuple(value)
    if not isinstance(value, str):
        raise FormatError(file, key, "is not a string")
    return value
