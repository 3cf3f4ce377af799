"""Ids against other implementations: llama.cpp's vectors, the tokenizers library on the original files, golden prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from formats.gguf import read_gguf
from text.gguf_vocabulary import read_vocabulary
from text.tokenizer import Tokenizer, load_tokenizer

Load = Callable[[str], Tokenizer]
SEPARATOR = "\n__ggml_vocab_test__\n"


def vectors(assets: Path, name: str) -> list[tuple[str, list[int]]]:
    folder = assets / "tokenizers" / "vectors"
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)
    ids = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(ids) == 47
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, ids, strict=True)]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("vectors/ggml-vocab-llama-spm.gguf", "llama-spm"),
        ("llama2/tokenizer.model", "llama-spm"),
        ("vectors/ggml-vocab-qwen2.gguf", "qwen2"),
        ("qwen2_5", "qwen2"),
        ("qwen1/qwen.tiktoken", "qwen2"),
        ("llama3_1", "llama-bpe"),
    ],
)
def test_vectors(assets: Path, load: Load, file: str, name: str) -> None:
    tokenizer = load(file)
    for text, ids in vectors(assets, name):
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


def mixed_text(seed: int, words: int) -> str:
    """Words, spaces, digits, punctuation and several scripts, in NFC and without characters that vocabularies lack."""
    rng = random.Random(seed)
    pieces = [
        "hello",
        "World",
        "don't",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "123",
        "4567",
        "3.14",
        "!!",
        "(x)",
        "é",
        "ß",
        "日本",
        "語",
        "мир",
        "🦙",
        "🇫🇷",
        "नमस्ते",
        "x=y;",
        "</",
        "'LL",
    ]
    return "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(words))


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "internlm2"])
def test_equals_the_library_on_the_original_file(assets: Path, load: Load, name: str) -> None:
    reference = tokenizers.Tokenizer.from_file(str(assets / "tokenizers" / name / "tokenizer.json"))
    tokenizer = load(name)
    for seed in range(30):
        text = mixed_text(seed, 60)
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("x", add_special=True) == reference.encode("x", add_special_tokens=True).ids


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("llama2/tokenizer.model", "vectors/ggml-vocab-llama-spm.gguf"),
        ("qwen2_5", "vectors/ggml-vocab-qwen2.gguf"),
        ("qwen2_5", "qwen1/qwen.tiktoken"),
    ],
)
def test_two_files_of_one_vocabulary_agree(load: Load, one: str, other: str) -> None:
    for seed in range(30):
        text = mixed_text(seed, 60)
        assert load(one).encode(text) == load(other).encode(text)


def test_smollm_gguf_against_its_golden_text(smollm2: Path, golden: list[dict]) -> None:
    tokenizer = load_tokenizer(smollm2)
    for prompt in golden:
        assert tokenizer.encode(prompt["prompt_text"], add_special=True, parse_special=True) == prompt["prompt_ids"]
        assert tokenizer.decode(prompt["ids_until_eos"]) == prompt["text"]
        assert tokenizer.decode(prompt["ids_64_ignore_eos"], skip_special=False) == prompt["text_64_ignore_eos"]


@pytest.mark.parametrize(("model", "file"), [("smollm2", "smollm2-135m-instruct.q4_1"), ("tinyllama", "tinyllama-1.1b-chat.iq2_xxs")])
def test_gguf_models_against_llama_cpp(request: pytest.FixtureRequest, assets: Path, model: str, file: str) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(model))
    for case in json.loads((assets / "golden" / f"{file}.llamacpp.json").read_text())["cases"]:
        assert len(tokenizer.encode(case["prompt"], add_special=True)) == case["usage"]["prompt_tokens"]
        assert tokenizer.decode([t["id"] for t in case["tokens"]], continuation=True) == case["text"]


def test_qwen_gguf_equals_its_tokenizer_json(qwen05: Path, load: Load) -> None:
    tokenizer, original = load_tokenizer(qwen05), load("qwen2_5")
    text = mixed_text(7, 200) + "<tool_call>\n<|im_end|>"
    for parse_special in (False, True):
        assert tokenizer.encode(text, parse_special=parse_special) == original.encode(text, parse_special=parse_special)


def test_internlm1_has_a_nul_piece(load: Load) -> None:
    tokenizer = load("internlm1/V7_sft.model")
    assert tokenizer.vocab_size == 103168
    assert tokenizer.token_bytes(354) == b"\0"
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"
    assert tokenizer.decode([354]) == "\0"


def test_internlm2_placeholders_are_the_declared_tokens(load: Load) -> None:
    tokenizer = load("internlm2")
    assert tokenizer.encode("<|im_start|>", parse_special=True) == [92543]
    assert tokenizer.token_text(92542) == "<|im_end|>"
    assert tokenizer.bos_id == 1 and tokenizer.add_bos


def test_stories260k(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "models" / "stories260K" / "tok512.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (512, 1, {2})
    ids = tokenizer.encode("Once upon a time", add_special=True)
    assert ids == [1, 403, 407, 261, 378]
    assert tokenizer.decode(ids) == "Once upon a time"
    assert load_tokenizer(assets / "models" / "stories260K" / "stories260K.bin").encode("Once upon a time") == ids[1:]


def test_qwen1_control_tokens_follow_the_ranks(load: Load) -> None:
    tokenizer = load("qwen1/qwen.tiktoken")
    ids = tokenizer.encode("<|im_start|>user<|im_end|><|extra_204|>", parse_special=True)
    assert ids == [151644, 872, 151645, 151850]
    assert tokenizer.vocab_size == 151851


def test_llama2_as_tokenizer_json(assets: Path, tmp_path: Path) -> None:
    """The form in which Hugging Face ships Llama 2: sentencepiece's merges spelled out, bytes and spaces in the pipeline."""
    vocabulary = read_vocabulary(read_gguf(assets / "tokenizers" / "vectors" / "ggml-vocab-llama-spm.gguf"))
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    splits = [(token[:n], token[n:], i) for token, i in vocab.items() if i > 258 for n in range(1, len(token))]
    merges = sorted(((a, b, i) for a, b, i in splits if a in vocab and b in vocab), key=lambda m: -vocabulary.scores[m[2]])
    model = tokenizers.models.BPE(vocab=vocab, merges=[(a, b) for a, b, _ in merges], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    library = tokenizers.Tokenizer(model)
    normal, parts = tokenizers.normalizers, tokenizers.decoders
    library.normalizer = normal.Sequence([normal.Prepend("\u2581"), normal.Replace(" ", "\u2581")])
    library.decoder = parts.Sequence([parts.Replace("\u2581", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": true}'
    )
    tokenizer = load_tokenizer(tmp_path)
    for text, ids in vectors(assets, "llama-spm"):
        assert tokenizer.encode(text, add_special=True) == [1, *ids]
        assert tokenizer.decode([1, *ids]) == text
    assert tokenizer.encode("a</s>b", parse_special=True) == library.encode("a</s>b").ids
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("a</s>b"))
