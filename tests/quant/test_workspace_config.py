"""config.ini of a workspace as our configuration: what each old word means, said aloud; and the whole way to a server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from api.loading import load, model_name, with_local_files
from config.schema import Config
from engine.cache.layout import KVLayout
from engine.errors import ConfigError
from engine.models.spec import load_spec
from engine.plan import plan_memory
from engine.sequence import SamplingParams
from engine.workspace_config import translate, with_workspace
from formats.workspace import KNOWN_ONCE, read_workspace
from quant.workspace import convert
from tests.fixtures.toy import toy_checkpoint
from tests.harness import answers, configure, running


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace as seed 002 has it: 2,048 positions trained, session_len 2,056."""
    folder = tmp_path_factory.mktemp("made")
    source = toy_checkpoint(folder / "hf", "internlm", dtype="float16", layers=1, max_position_embeddings=2048, kv_heads=4)
    config = json.loads((source / "config.json").read_text())
    del config["rotary"]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, folder / "w", model_name="internlm-chat-7b")
    return folder / "w"


@pytest.fixture
def workspace(made: Path, tmp_path: Path) -> Path:
    """Its config.ini may be changed; the weights are linked."""
    folder = tmp_path / "w" / "triton_models" / "weights"
    folder.mkdir(parents=True)
    for path in (made / "triton_models" / "weights").iterdir():
        if path.name == "config.ini":
            (folder / path.name).write_text(path.read_text())
        else:
            (folder / path.name).symlink_to(path)
    (tmp_path / "w" / "triton_models" / "tokenizer").symlink_to(made / "triton_models" / "tokenizer")
    return tmp_path / "w"


def change(workspace: Path, **values: Any) -> None:
    path = workspace / "triton_models/weights/config.ini"
    lines = [line for line in path.read_text().splitlines() if line.split(" = ")[0] not in values]
    path.write_text("\n".join(lines + [f"{k} = {v}" for k, v in values.items()]))


def understood(workspace: Path) -> tuple[dict[str, Any], str]:
    translation = translate(read_workspace(workspace), load_spec(workspace))
    return translation.values, "\n".join(translation.sentences)


def test_what_the_seed_has(workspace: Path) -> None:
    values, said = understood(workspace)
    assert values == {
        "model.model_name": "internlm-chat-7b",
        "engine.session_len": 2048,
        "engine.max_batch_size": 64,
        "engine.max_prefill_token_num": 2056,
        "cache.cache_block_seq_len": 128,
        "cache.quant_policy": 0,
    }
    assert "session_len = 2056 is more than the 2048 the model was trained for" in said
    assert "max_context_token_num = 1, not above max_batch_size, counts sessions of 2056: engine.max_prefill_token_num = 2056" in said
    assert "cache_max_entry_count = 0.5 was a share of all device memory" in said


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"max_context_token_num": 0}, "engine.max_prefill_token_num", 2056),
        ({"max_context_token_num": 4}, "engine.max_prefill_token_num", 8224),
        ({"max_context_token_num": 65}, "engine.max_prefill_token_num", 65),
        ({"max_batch_size": 3, "max_context_token_num": 4}, "engine.max_prefill_token_num", 4),
        ({"session_len": 100, "max_context_token_num": 64}, "engine.max_prefill_token_num", 6400),
        ({"session_len": 100}, "engine.session_len", 100),
        ({"rope_scaling_factor": 1.0}, "engine.session_len", 2056),
        ({"cache_max_entry_count": 48}, "cache.num_blocks", 48),
        ({"max_batch_size": 1}, "engine.max_batch_size", 1),
        ({"cache_block_seq_len": 64}, "cache.cache_block_seq_len", 64),
    ],
)
def test_settings(workspace: Path, given: dict[str, Any], key: str, value: int) -> None:
    change(workspace, **given)
    assert understood(workspace)[0][key] == value


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"step_length": 2}, "step_length: 2"),
        ({"use_context_fmha": 3}, "use_context_fmha: 3"),
        ({"cache_block_seq_len": 100}, "cache_block_seq_len: 100"),
        ({"cache_max_entry_count": 1.5}, "cache_max_entry_count: 1.5"),
        ({"cache_max_entry_count": 0}, "cache_max_entry_count: 0"),
        ({"max_batch_size": 0}, "max_batch_size: 0"),
        ({"session_len": 0}, "session_len: 0"),
        ({"max_context_token_num": -1}, "max_context_token_num: -1"),
        ({"quant_policy": 2}, "quant_policy: 2 is not supported"),
    ],
)
def test_refused(workspace: Path, given: dict[str, Any], says: str) -> None:
    change(workspace, **given)
    with pytest.raises(ConfigError, match=says):
        understood(workspace)


@pytest.mark.parametrize("known", [(0,), (0, 4, 8)])
def test_quant_policy_4_was_int8(workspace: Path, known: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """8 today, where KV int8 is built; else refused by its name."""
    from config.load import KNOBS

    knob = dataclasses.replace(KNOBS["cache"]["quant_policy"], choices=known)
    monkeypatch.setitem(KNOBS["cache"], "quant_policy", knob)
    change(workspace, quant_policy=4)
    if 8 in known:
        values, said = understood(workspace)
        assert (
            values["cache.quant_policy"] == 8
            and "quant_policy = 4 meant int8 K and V then (it is 8 now; 4 is int4): cache.quant_policy = 8" in said
        )
    else:
        with pytest.raises(ConfigError, match="quant_policy: 4, which meant int8 K and V, is not supported; set it to 0"):
            understood(workspace)


@pytest.fixture
def int8_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with int8 and int4 K/V, also where this one is not (yet)."""
    from config.load import KNOBS

    monkeypatch.setitem(KNOBS["cache"], "quant_policy", dataclasses.replace(KNOBS["cache"]["quant_policy"], choices=(0, 4, 8)))


def test_the_changed_meaning_of_quant_policy_is_a_warning(workspace: Path, int8_kv: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "numbatch.load")
    change(workspace, quant_policy=4)
    found = with_workspace(configure(model={"path": str(workspace)}))
    assert found.cache.quant_policy == 8
    aloud = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(aloud) == 1 and "meant int8 K and V then (it is 8 now; 4 is int4): cache.quant_policy = 8" in aloud[0]
    assert "past_kv_scale" in caplog.text
    caplog.clear()
    assert with_workspace(found) == found and not caplog.records


def test_a_4_of_todays_beside_a_4_of_then(workspace: Path, int8_kv: None, caplog: pytest.LogCaptureFixture) -> None:
    """int4 was asked for, in today's words, and stays; but who copied the number from config.ini hears what it means now."""
    change(workspace, quant_policy=4)
    config = configure(model={"path": str(workspace)})
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, quant_policy=4))
    assert with_workspace(config).cache.quant_policy == 4
    assert "cache.quant_policy = 4 is int4" in caplog.text and "meant int8, which is 8 now" in caplog.text


def test_what_has_no_counterpart_is_said(workspace: Path) -> None:
    change(workspace, cache_chunk_size=-1, use_context_fmha=0)
    said = understood(workspace)[1]
    assert "cache_chunk_size = -1: all blocks are allocated at once" in said and "use_context_fmha = 0:" in said


def test_the_users_own_configuration_rules(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "numbatch.load")
    config = configure(model={"path": str(workspace)}, engine={"max_batch_size": 5})
    resolved = with_local_files(config)
    assert (resolved.engine.max_batch_size, resolved.engine.session_len) == (5, 2048)
    assert "engine.max_batch_size stays 5" in caplog.text and "counts sessions of 2056" in caplog.text
    caplog.clear()
    assert with_workspace(resolved) == resolved and "sessions" not in caplog.text  # in a rank: it was said
    other = configure(model={"path": str(workspace.parent)})
    assert with_workspace(other) is other and with_workspace(Config()) == Config()


def test_the_users_scaling_lengthens_sessions(workspace: Path) -> None:
    """Seed 002's way past the trained length, from our side: rope_scaling_factor = 1 and config.ini's own session_len."""
    config = configure(model={"path": str(workspace)}, engine={"rope_scaling_factor": 1.0})
    assert with_local_files(config).engine.session_len == 2056


def test_names(workspace: Path) -> None:
    assert model_name(configure(model={"path": str(workspace)})) == "internlm-chat-7b"
    assert model_name(configure(model={"path": str(workspace), "model_name": "mine"})) == "mine"
    (workspace / "triton_models/weights/config.ini").write_text("")
    assert model_name(configure(model={"path": str(workspace)})) == "w"


def test_a_key_of_another_lmdeploy_says_so(workspace: Path) -> None:
    from engine.errors import ModelError

    for key, reason in KNOWN_ONCE.items():
        change(workspace, **{key: 1})
        with pytest.raises(ModelError, match=f"{key}: {reason[:20]}"):
            load_spec(workspace)
        text = (workspace / "triton_models/weights/config.ini").read_text()
        (workspace / "triton_models/weights/config.ini").write_text("\n".join(x for x in text.splitlines() if not x.startswith(key)))


def test_an_int8_workspace_of_then_is_served_with_int8_kv(workspace: Path) -> None:
    """quant_policy = 4 in config.ini: the pool is LMDeploy's int8 and not today's int4, from the plan to the answers."""
    given = configure(model={"path": str(workspace)}, engine={"device": "cpu", "max_batch_size": 2, "session_len": 128})
    given = dataclasses.replace(given, cache=dataclasses.replace(given.cache, num_blocks=4, cache_block_seq_len=16))
    plain = with_local_files(given)
    change(workspace, quant_policy=4)
    old = with_local_files(given)
    assert (plain.cache.quant_policy, old.cache.quant_policy) == (0, 8)
    spec = load_spec(workspace)
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, 16, "bfloat16", 8)
    assert plan_memory(old, spec, workspace, 1 << 28).block_bytes == layout.block_bytes

    async def run(config: Config) -> list[list[int]]:
        async with running(config) as engine:
            return await answers(engine, [[5, 6, 7, 8]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True), together=True)

    assert asyncio.run(run(old))[0][0] == asyncio.run(run(plain))[0][0]  # int8 is near: the same first choice


@pytest.mark.timeout(300)
def test_smollm2_converted_and_served(smollm2: Path, assets: Path, tmp_path: Path) -> None:
    """Three ranks' files of a real model, served by one: text through its own tokenizer, the ids transformers gives."""
    made = convert(smollm2, tmp_path / "w", model_name="smollm2", tp=3)
    assert made.files == 30 * (2 + 3 * 5) + 3
    golden = json.loads((assets / "golden" / "smollm2-135m-instruct.float32.transformers.json").read_text())
    case = next(value for value in golden.values() if isinstance(value, list))[1]
    config = configure(
        model={"path": str(tmp_path / "w"), "dtype": "float32"},
        engine={"device": "cpu", "max_batch_size": 4, "session_len": 256},
        cache={"num_blocks": 8},
    )
    loaded = load(config)
    assert loaded.template is not None and loaded.tokenizer.decode(case["ids_64_ignore_eos"][:8])
    loaded.template.close()

    async def run() -> list[list[int]]:
        async with running(with_local_files(config)) as engine:
            return await answers(
                engine, [case["prompt_ids"]], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True), together=True
            )

    assert asyncio.run(run()) == [case["ids_64_ignore_eos"][:16]]
