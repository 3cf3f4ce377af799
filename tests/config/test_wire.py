"""A configuration reaches a rank as it is, and what does not fit is refused."""

from __future__ import annotations

import dataclasses

import pytest

from config.schema import Config
from config.wire import config_from_json, config_to_json


def test_round_trip() -> None:
    config = dataclasses.replace(Config(), server=dataclasses.replace(Config().server, api_keys=("a", "b"), allow_origins=()))
    assert config_from_json(config_to_json(config)) == config


def test_unknown_section_is_refused() -> None:
    with pytest.raises(TypeError):
        config_from_json(config_to_json(Config())[:-1] + ', "more": {}}')
