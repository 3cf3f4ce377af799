"""Request bodies as tables: one `Field` a key, from which both the strict parser and the OpenAPI document are made.

Types are exact (`true` is no integer, "1" is no number, 1.0 is no count), numbers are finite and in range, `null`
means the default, an unknown key is refused with the nearest name. Knows no endpoint and no engine.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.errors import ApiError, bad

Schema = dict[str, Any]
# what other programs and endpoints call a field that is known here
INSTEAD = {
    "messages": ("prompt", "input", "text"),
    "prompt": ("messages", "input"),
    "input": ("messages", "prompt"),
    "max_new_tokens": ("max_tokens", "max_output_tokens"),
    "max_length": ("max_tokens", "max_output_tokens", "max_new_tokens"),
    "num_predict": ("max_tokens", "max_output_tokens", "max_new_tokens"),
    "n_predict": ("max_tokens", "max_output_tokens", "max_new_tokens"),
    "stop_words": ("stop", "stop_sequences"),
    "random_seed": ("seed", "sampling_seed"),
}
Table = Mapping[str, "Field"]


@dataclass(frozen=True, slots=True)
class Field:
    """`parse(name, value)` returns the checked value of a non-null `value` or raises; `schema` says the same as JSON Schema."""

    name: str
    doc: str
    schema: Schema
    parse: Callable[[str, Any], Any]
    default: Any = None
    required: bool = False


def table(fields: Sequence[Field]) -> dict[str, Field]:
    return {field.name: field for field in fields}


def parse_object(fields: Table, body: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """All fields of the table, checked, with defaults; `where` prefixes the names in errors ("stream_options.")."""
    for name in body:
        if name not in fields:
            raise _unknown(name, fields, where)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        value = body.get(name)
        if value is None:
            if field.required:
                raise bad(where + name, f"{where}{name} is required.", "missing_required_parameter")
            values[name] = field.default
        else:
            values[name] = field.parse(where + name, value)
    return values


def json_schema(fields: Table) -> Schema:
    """The table as JSON Schema (OpenAPI 3.1 dialect)."""
    properties = {name: _property(field) for name, field in fields.items()}
    required = [name for name, field in fields.items() if field.required]
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _property(field: Field) -> Schema:
    schema = dict(field.schema)
    if not field.required:
        schema = _nullable(schema)
    schema["description"] = field.doc
    if field.default is not None and not isinstance(field.default, tuple):
        schema["default"] = field.default
    return schema


def _nullable(schema: Schema) -> Schema:
    if schema.get("type") == "null":
        return schema
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {**schema, "type": [schema["type"], "null"], "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def _unknown(name: str, fields: Table, where: str) -> ApiError:
    shown = name[:64]
    near = [other for other in INSTEAD.get(shown, ()) if other in fields] or difflib.get_close_matches(shown, fields, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return bad(where + shown, f"There is no field {where + shown!r}.{hint}", "unknown_parameter")


# -- kinds of fields --------------------------------------------------------------------------------------


def kind(value: Any) -> str:
    """What a JSON value is, for a sentence."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "something else")


def wrong_type(name: str, wanted: str, value: Any) -> ApiError:
    return bad(name, f"{name} must be {wanted}, not {kind(value)}.", "invalid_type")


def not_one_of(name: str, allowed: Sequence[str], value: Any) -> ApiError:
    shown = repr(value[:32]) if type(value) is str else kind(value)
    return bad(name, f"{name} must be one of {', '.join(allowed)}; not {shown}.", "invalid_value")


def check_int(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int:
        # orjson reads an integer beyond 64 bits as a float
        wanted = f"an integer between {low} and {high}"
        if type(value) is float:
            raise bad(name, f"{name} must be {wanted}, not {value:g}.", "invalid_type")
        raise wrong_type(name, wanted, value)
    if not low <= value <= high:
        raise bad(name, f"{name} must be between {low} and {high}, not {value}.", "invalid_value")
    return value


def check_number(name: str, value: Any, low: float, high: float) -> float:
    if type(value) is not float and type(value) is not int:
        raise wrong_type(name, "a number", value)
    if not (math.isfinite(value) and low <= value <= high):
        raise bad(name, f"{name} must be between {low:g} and {high:g}, not {value:g}.", "invalid_value")
    return float(value) + 0.0  # -0.0 becomes 0.0


def check_str(name: str, value: Any, max_chars: int) -> str:
    if type(value) is not str:
        raise wrong_type(name, "a string", value)
    if len(value) > max_chars:
        raise bad(name, f"{name} has {len(value)} characters; at most {max_chars} are allowed.", "string_above_max_length")
    return value


def check_bool(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise wrong_type(name, "true or false", value)
    return value


def check_list(name: str, value: Any, max_items: int) -> list[Any]:
    if type(value) is not list:
        raise wrong_type(name, "an array", value)
    if len(value) > max_items:
        raise bad(name, f"{name} has {len(value)} entries; at most {max_items} are allowed.", "array_above_max_length")
    return value


def integer(name: str, low: int, high: int, doc: str, default: int | None = None) -> Field:
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Field(name, doc, schema, lambda name, value: check_int(name, value, low, high), default)


def number(name: str, low: float, high: float, doc: str, default: float | None = None) -> Field:
    schema = {"type": "number", "minimum": low, "maximum": high}
    return Field(name, doc, schema, lambda name, value: check_number(name, value, low, high), default)


def pattern(name: str, regex: str, doc: str, default: str = "") -> Field:
    expression = re.compile(regex)

    def parse(name: str, value: Any) -> str:
        if type(value) is not str:
            raise wrong_type(name, "a string", value)
        if not expression.fullmatch(value):
            raise bad(name, f"{name} must match {regex}.", "invalid_value")
        return value

    return Field(name, doc, {"type": "string", "pattern": f"^(?:{regex})$"}, parse, default)


def boolean(name: str, doc: str, default: bool | None = False) -> Field:
    return Field(name, doc, {"type": "boolean"}, check_bool, default)


def string(name: str, max_chars: int, doc: str, default: str | None = None, required: bool = False) -> Field:
    schema = {"type": "string", "maxLength": max_chars}
    return Field(name, doc, schema, lambda name, value: check_str(name, value, max_chars), default, required)


def choice(name: str, allowed: tuple[str, ...], doc: str, default: str | None = None) -> Field:
    def parse(name: str, value: Any) -> str:
        if type(value) is not str:
            raise wrong_type(name, "a string", value)
        if value not in allowed:
            raise not_one_of(name, allowed, value)
        return value

    return Field(name, doc, {"type": "string", "enum": list(allowed)}, parse, default)


def unsupported(name: str, why: str, harmless: tuple[Any, ...] = (), schema: Schema | None = None) -> Field:
    """A field of the OpenAI API that is refused unless it has one of the values that ask for nothing."""

    def parse(name: str, value: Any) -> None:
        if not any(value == item and type(value) is type(item) for item in harmless):
            raise bad(name, f"{name} is not supported: {why}", "unsupported_parameter")

    return Field(name, f"Not supported: {why}", schema or {"type": "null"}, parse)


def nested(name: str, fields: Table, doc: str) -> Field:
    def parse(name: str, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise wrong_type(name, "an object", value)
        return parse_object(fields, value, f"{name}.")

    return Field(name, doc, json_schema(fields), parse)


def in_words(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, for people: literal values in backquotes; that null means the default goes without saying."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(in_words(way) for way in schema["anyOf"] if way.get("type") != "null"))
    if "enum" in schema:
        values = [value for value in schema["enum"] if value is not None]
        return "one of " * (len(values) > 1) + ", ".join(f"`{value}`" for value in values)
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "any")
    text = " or ".join(k for k in kind if k != "null") if isinstance(kind, list) else str(kind)
    if text == "array" and "items" in schema:
        text = f"array of {in_words(schema['items'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    return text if low is None or high is None else f"{text}, {low:g} to {high if isinstance(high, int) else f'{high:g}'}"
