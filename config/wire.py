"""A `Config` as JSON text and back: how it reaches the process of a rank. The value was validated before it left."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from config.schema import Config


def config_to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config))


def config_from_json(text: str) -> Config:
    """The same `Config`; raises TypeError for a section or key that this version does not have."""
    sections = json.loads(text)
    made: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        values = sections.pop(field.name)
        section = type(getattr(Config(), field.name))
        made[field.name] = section(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    if sections:
        raise TypeError(f"unknown config sections: {sorted(sections)}")
    return Config(**made)
