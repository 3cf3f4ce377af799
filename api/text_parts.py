"""What is said in a message: a string, or an array of text parts that are joined as they are.

The protocols differ in what they call a part and in what may lie beside its text; a `Parts` says that, and from it come
both the reader and the JSON schema. What is not text is refused by name. Knows no endpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from api.errors import bad
from api.schema import Schema, check_str, kind, not_one_of, wrong_type

NO_TOOLS = "tool calls come in a later version."
ONLY_TEXT = 'structured output comes in a later version; {"type": "text"} is what there is.'
NOT_TEXT = "this server reads text only."
MAX_CHARS = 1 << 26  # of one part; a body is bounded long before


def role_of(where: str, message: dict[str, Any], roles: tuple[str, ...], *, hint: str = "") -> str:
    """The role of a message, one of `roles`; `hint`: another sentence for those who have another one."""
    role = message.get("role")
    if role is None:
        raise bad(f"{where}.role", f"{where}.role is missing; it is one of {', '.join(roles)}.", "invalid_value")
    if role in ("tool", "function"):
        raise bad(f"{where}.role", f"{where}.role {role!r} is not supported: {NO_TOOLS}", "unsupported_value")
    if type(role) is not str or role not in roles:
        error = not_one_of(f"{where}.role", roles, role)
        raise bad(error.param, f"{error}{hint}", error.code)
    return role


@dataclass(frozen=True, slots=True)
class Parts:
    """`types`: what a text part may call itself; `extras`: keys beside the text that ask for nothing here."""

    types: tuple[str, ...] = ("text",)
    extras: tuple[str, ...] = ()
    noun: str = "part"
    may_be_empty: bool = False

    def read(self, where: str, content: Any) -> str:
        """The whole text; raises for what is no text."""
        if type(content) is str:
            return content
        if content is None:
            raise bad(where, f"{where} is missing; give a string or an array of text {self.noun}s.", "invalid_type")
        if type(content) is not list:
            raise wrong_type(where, f"a string or an array of text {self.noun}s", content)
        if not content and not self.may_be_empty:
            raise bad(where, f"{where} is an empty array; send a string or at least one text {self.noun}.", "invalid_value")
        return "".join(self._text(f"{where}[{i}]", part) for i, part in enumerate(content))

    def _text(self, here: str, part: Any) -> str:
        example = f'{{"type": "{self.types[0]}", "text": "..."}}'
        if type(part) is not dict:
            raise bad(here, f"{here} must be an object like {example}, not {kind(part)}.", "invalid_type")
        name = part.get("type")
        if type(name) is not str:
            raise bad(f"{here}.type", f"{here} needs a type: it must be an object like {example}.", "invalid_type")
        if name not in self.types:
            why = NO_TOOLS if "tool" in name or "call" in name else NOT_TEXT
            raise bad(f"{here}.type", f"{here}.type {name[:32]!r} is not supported: {why}", "unsupported_value")
        for key in part:
            if key not in ("type", "text", *self.extras):
                raise bad(f"{here}.{key[:64]}", f"There is no field {key[:64]!r} in a text {self.noun}.", "unknown_parameter")
        return check_str(f"{here}.text", part.get("text"), MAX_CHARS)

    def array(self) -> Schema:
        """The array as JSON Schema."""
        names = {"const": self.types[0]} if len(self.types) == 1 else {"type": "string", "enum": list(self.types)}
        properties = {"type": names, "text": {"type": "string"}, **{name: {} for name in self.extras}}
        part = {"type": "object", "properties": properties, "required": ["type", "text"], "additionalProperties": False}
        array: Schema = {"type": "array", "items": part}
        return array if self.may_be_empty else array | {"minItems": 1}

    def schema(self) -> Schema:
        """What `read` takes, as JSON Schema."""
        return {"anyOf": [{"type": "string"}, self.array()]}
