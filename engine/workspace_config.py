"""The engine settings in a workspace's config.ini as ours, each with the sentence that says how it was understood.

A setting of config.ini counts where ours is at its default. Words that have changed their meaning since LMDeploy 0.1
are translated into today's (quant_policy 4 was int8), and what nothing here answers to is said.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.load import KNOBS
from config.schema import Config
from engine.errors import ConfigError, ModelError
from engine.models.spec import ModelSpec, apply_overrides
from engine.workspace import spec_of_workspace
from formats.errors import FormatError
from formats.workspace import CONFIG, Workspace, is_workspace, read_workspace

log = logging.getLogger("numbatch.load")

OLD_INT8 = 4  # config.ini's quant_policy; int4 today
QUANT_POLICY = {0: 0, OLD_INT8: 8}  # config.ini's -> ours


@dataclass(slots=True)
class Translation:
    """Our keys with their values, and what the log says; `aloud`: as a warning, where a word would mean another thing today."""

    values: dict[str, Any] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    aloud: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, said: str) -> None:
        self.values[key] = value
        self.sentences.append(f"{CONFIG}: {said}: {key} = {value}")

    def say(self, sentence: str) -> None:
        self.sentences.append(f"{CONFIG}: {sentence}")


def with_workspace(config: Config) -> Config:
    """The configuration with what a workspace's config.ini says, where `model.path` is one; as it is otherwise."""
    path = Path(config.model.path)
    if not config.model.path or not is_workspace(path):
        return config
    try:
        workspace = read_workspace(path)
    except FormatError as e:
        raise ModelError(str(e)) from e
    translation = translate(workspace, apply_overrides(spec_of_workspace(workspace), config.engine))
    defaults, sections = Config(), dict[str, dict[str, Any]]()
    if config.cache.quant_policy == OLD_INT8 == workspace.integer("quant_policy"):
        log.warning("cache.quant_policy = 4 is int4, as the configuration says; %s's quant_policy = 4 meant int8, which is 8 now", CONFIG)
    for key, value in translation.values.items():
        section, name = key.split(".")
        ours = getattr(getattr(config, section), name)
        if ours == value:
            continue
        if ours != getattr(getattr(defaults, section), name):
            log.info("%s: %s stays %s, as the configuration says", CONFIG, key, ours)
            continue
        sections.setdefault(section, {})[name] = value
    if sections:  # not when it was translated before
        for sentence in translation.sentences:
            log.log(logging.WARNING if sentence in translation.aloud else logging.INFO, sentence)
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()}
    )


def translate(workspace: Workspace, spec: ModelSpec) -> Translation:
    """Every setting that is not the model's. ConfigError where one cannot be honoured."""
    out = Translation()
    out.put("model.model_name", workspace.text("model_name"), "model_name names the model and its chat template")
    ranks = workspace.integer("tensor_para_size")
    out.say(f"tensor_para_size = {ranks}: the files of {ranks} ranks are joined; engine.tp says how many serve them")
    _lengths(workspace, spec, out)
    _cache(workspace, out)
    if workspace.integer("step_length") != 1:
        raise ConfigError(f"{CONFIG}:step_length: {workspace.integer('step_length')} decode steps at once are not supported; set it to 1")
    if workspace.integer("use_context_fmha") not in (0, 1):
        raise ConfigError(f"{CONFIG}:use_context_fmha: {workspace.integer('use_context_fmha')} is neither 0 nor 1")
    if not workspace.integer("use_context_fmha"):
        out.say("use_context_fmha = 0: prompts have one attention kernel here, which never keeps the scores")
    return out


def _lengths(workspace: Workspace, spec: ModelSpec, out: Translation) -> None:
    session, batch = workspace.integer("session_len"), workspace.integer("max_batch_size")
    if not 1 <= session <= _knob_max("engine.session_len"):
        raise ConfigError(f"{CONFIG}:session_len: {session} is outside 1 .. {_knob_max('engine.session_len')}")
    if not 1 <= batch <= _knob_max("engine.max_batch_size"):
        raise ConfigError(f"{CONFIG}:max_batch_size: {batch} is outside 1 .. {_knob_max('engine.max_batch_size')}")
    if session > spec.longest:
        said = f"session_len = {session} is more than the {spec.longest} the model was trained for (see rope_scaling_factor)"
        out.put("engine.session_len", spec.longest, said)
    else:
        out.put("engine.session_len", session, f"session_len = {session}")
    out.put("engine.max_batch_size", batch, f"max_batch_size = {batch}")
    tokens = workspace.integer("max_context_token_num")
    if tokens < 0:
        raise ConfigError(f"{CONFIG}:max_context_token_num: {tokens} is negative")
    said = f"max_context_token_num = {tokens}"
    if tokens == 0:
        tokens, said = session, f"{said} means session_len"
    elif tokens <= batch:
        tokens, said = tokens * session, f"{said}, not above max_batch_size, counts sessions of {session}"
    out.put("engine.max_prefill_token_num", min(tokens, _knob_max("engine.max_prefill_token_num")), said)


def _cache(workspace: Workspace, out: Translation) -> None:
    size = workspace.integer("cache_block_seq_len")
    sizes = KNOBS["cache"]["cache_block_seq_len"].choices
    if size not in sizes:
        raise ConfigError(f"{CONFIG}:cache_block_seq_len: {size} is not supported; supported: {', '.join(map(str, sizes))}")
    out.put("cache.cache_block_seq_len", size, f"cache_block_seq_len = {size}")
    share = workspace.number("cache_max_entry_count")
    if share <= 0 or share >= 1 and share != int(share):
        raise ConfigError(f"{CONFIG}:cache_max_entry_count: {share:g} is neither a share between 0 and 1 nor a number of blocks")
    if share >= 1:
        out.put("cache.num_blocks", int(share), f"cache_max_entry_count = {share:g} is a number of blocks")
    else:
        out.say(
            f"cache_max_entry_count = {share:g} was a share of all device memory; cache.cache_max_entry_count is one of what is free "
            "after the weights and stays as it is"
        )
    if workspace.integer("cache_chunk_size") != 1:
        out.say(f"cache_chunk_size = {workspace.integer('cache_chunk_size')}: all blocks are allocated at once here")
    policy = workspace.integer("quant_policy")
    ours = QUANT_POLICY.get(policy)
    choices = KNOBS["cache"]["quant_policy"].choices
    if ours is None or ours not in choices:
        meant = f"{policy}, which meant int8 K and V," if policy == OLD_INT8 else f"{policy}"
        known = " or ".join(str(old) for old, new in QUANT_POLICY.items() if new in choices)
        raise ConfigError(f"{CONFIG}:quant_policy: {meant} is not supported; set it to {known}")
    if policy == OLD_INT8:
        out.put("cache.quant_policy", ours, f"quant_policy = {policy} meant int8 K and V then (it is 8 now; 4 is int4)")
        out.aloud.append(out.sentences[-1])
        out.say("its past_kv_scale files, where there are any, are not needed: scales are found for every token and head as it comes")
    else:
        out.put("cache.quant_policy", ours, f"quant_policy = {policy}")


def _knob_max(key: str) -> int:
    section, name = key.split(".")
    return int(KNOBS[section][name].high or 0)
