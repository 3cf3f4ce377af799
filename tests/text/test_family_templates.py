"""Old families' checkpoints without a chat template of their own, and workspaces: which built-in one they get."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from text.chat import load_chat_template
from text.errors import NoChatTemplate
from text.tokenizer import load_tokenizer


def model(path: Path, pieces: list[str]) -> None:
    """A sentencepiece model of the letters, with `pieces` as user-defined ones."""
    out = io.BytesIO()
    lines = ["hello world this is a text of some letters", "another line of words with other letters", "quick brown foxes jump"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=pieces,
        minloglevel=2,
    )
    path.write_bytes(out.getvalue())


def directory(path: Path, architecture: str, **files: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def rendered(path: Path, text: str = "hello") -> list[str]:
    tokenizer = load_tokenizer(path)
    template = load_chat_template(None, tokenizer)
    return [tokenizer.token_text(i) for i in template.render([{"role": "user", "content": text}])]


def test_internlm(tmp_path: Path) -> None:
    path = directory(tmp_path / "x", "InternLMForCausalLM")
    model(path / "tokenizer.model", ["<eoh>", "<eoa>"])
    assert "<|User|>:hello" in "".join(rendered(path)).replace(" ", "")
    tokenizer = load_tokenizer(path)
    eoa = tokenizer.specials["<eoa>"].id
    assert eoa in load_chat_template(None, tokenizer).stop_ids
    assert eoa not in tokenizer.encode("say <eoa> now")  # users cannot write it


def test_a_base_model_has_none(tmp_path: Path) -> None:
    path = directory(tmp_path / "x", "InternLMForCausalLM")
    model(path / "tokenizer.model", ["<other>"])
    with pytest.raises(NoChatTemplate):
        load_chat_template(None, load_tokenizer(path))


def test_internlm2_fills_its_placeholders(tmp_path: Path) -> None:
    """tokenizer.model has [UNUSED_TOKEN_n] where tokenizer_config.json declares the control tokens."""
    path = directory(tmp_path / "x", "InternLM2ForCausalLM")
    model(path / "tokenizer.model", ["[UNUSED_TOKEN_144]", "[UNUSED_TOKEN_145]"])
    ids = {name: load_tokenizer(path).encode(name)[-1] for name in ("[UNUSED_TOKEN_144]", "[UNUSED_TOKEN_145]")}
    added = {str(ids["[UNUSED_TOKEN_144]"]): "<|im_end|>", str(ids["[UNUSED_TOKEN_145]"]): "<|im_start|>"}
    declared = {i: {"content": content, "special": True} for i, content in added.items()}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    tokens = rendered(path)
    assert tokens.count("<|im_start|>") == 2 and tokens.count("<|im_end|>") == 1
    tokenizer = load_tokenizer(path)
    assert tokenizer.specials["<|im_end|>"].id == ids["[UNUSED_TOKEN_144]"]
    assert tokenizer.specials["<|im_end|>"].id in load_chat_template(None, tokenizer).stop_ids


def test_qwen(tmp_path: Path, assets: Path) -> None:
    """Seed 004's count: 21 prompt tokens for a question of two, the default system prompt among them."""
    path = directory(tmp_path / "x", "QWenLMHeadModel", generation_config={"chat_format": "chatml", "eos_token_id": 151643})
    (path / "qwen.tiktoken").symlink_to(assets / "tokenizers" / "qwen1" / "qwen.tiktoken")
    tokens = rendered(path, "测试一下")
    assert len(tokens) == 21 and "".join(tokens[:3]) == "<|im_start|>system\n"
    tokenizer = load_tokenizer(path)
    assert tokenizer.specials["<|im_end|>"].id in load_chat_template(None, tokenizer).stop_ids
    (path / "generation_config.json").write_text(json.dumps({"chat_format": "raw"}))  # Qwen-7B without -Chat
    with pytest.raises(NoChatTemplate):
        load_chat_template(None, load_tokenizer(path))


def test_baichuan2(tmp_path: Path) -> None:
    path = directory(tmp_path / "x", "BaichuanForCausalLM", generation_config={"user_token_id": 3, "assistant_token_id": 4})
    model(path / "tokenizer.model", ["<reserved_106>", "<reserved_107>"])
    tokens = rendered(path)
    assert tokens[0] == "<s>" and tokens[1] == "<reserved_106>" and tokens[-1] == "<reserved_107>"
    (path / "generation_config.json").unlink()
    with pytest.raises(NoChatTemplate):
        load_chat_template(None, load_tokenizer(path))


def test_the_checkpoints_own_template_comes_first(tmp_path: Path) -> None:
    own = {"chat_template": "{% for m in messages %}{{ m.content }}!{% endfor %}"}
    path = directory(tmp_path / "x", "InternLMForCausalLM", tokenizer_config=own)
    model(path / "tokenizer.model", ["<eoh>", "<eoa>"])
    assert "".join(rendered(path)).endswith("hello!")


def test_a_workspace_names_its_template(tmp_path: Path) -> None:
    """LMDeploy's model_name won over whatever the checkpoint brought."""
    weights, tokenizer = (tmp_path / "w" / "triton_models" / name for name in ("weights", "tokenizer"))
    weights.mkdir(parents=True)
    own = {"chat_template": "{% for m in messages %}{{ m.content }}!{% endfor %}"}
    directory(tokenizer, "LlamaForCausalLM", tokenizer_config=own)
    model(tokenizer / "tokenizer.model", ["<eoh>", "<eoa>"])
    from formats.workspace import KEYS, settings_text

    values: dict[str, Any] = {key: 1 if kind is not str else "x" for key, kind in KEYS.items()}
    (weights / "config.ini").write_text(settings_text(values | {"model_name": "internlm-chat-7b"}))
    assert "<|User|>:hello" in "".join(rendered(tmp_path / "w")).replace(" ", "")
    (weights / "config.ini").write_text(settings_text(values | {"model_name": "my-own-model"}))
    assert "".join(rendered(tmp_path / "w")).endswith("hello!")
