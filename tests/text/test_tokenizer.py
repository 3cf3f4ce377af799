"""The rules that hold for every vocabulary, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.errors import FormatError
from tests.text.gguf_files import bpe_metadata, spm_metadata
from text.errors import Unencodable
from text.tokenizer import Tokenizer, load_tokenizer

Write = Callable[[dict[str, Any]], Path]
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
with_controls = st.lists(
    st.sampled_from(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im", "_end|>", "<0x0A>", " ", "x", "\n"]), max_size=8
).map("".join)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=anything | with_controls)
def test_round_trip_without_any_control_id(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    assert tiny.special_ids.isdisjoint(ids)
    assert tiny.decode(ids) == text
    assert all(0 <= i < tiny.vocab_size for i in ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=with_controls)
def test_parse_special_finds_each_spelling_once(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text, parse_special=True)
    assert [i for i in ids if i in tiny.special_ids] == [tiny.specials[m].id for m in tiny.special_pattern.findall(text)]


def test_ids_of_the_tiny_vocabularies(tiny_bpe: Tokenizer, tiny_spm: Tokenizer, byte_tokenizer: Tokenizer) -> None:
    assert tiny_bpe.encode("hello<|im_end|>", parse_special=True) == [258, ord("o"), 261]
    assert tiny_spm.encode("hello", add_special=True) == [1, 266, 265, 263]
    assert tiny_spm.encode("\u00e9") == [259, 3 + 0xC3, 3 + 0xA9]
    assert byte_tokenizer.encode("h\u00e9<|im_start|>", parse_special=True) == [104, 0xC3, 0xA9, 258]
    assert byte_tokenizer.eos_ids == {257, 259} and byte_tokenizer.special_ids == {256, 257, 258, 259}
    assert byte_tokenizer.vocab_size == 260


def test_token_bytes_and_text(tiny_bpe: Tokenizer, tiny_spm: Tokenizer) -> None:
    assert tiny_bpe.token_bytes(258) == b"hell"
    assert tiny_bpe.token_bytes(0xC3) == b"\xc3" and tiny_bpe.token_text(0xC3) == "\ufffd"
    assert tiny_bpe.token_bytes(262) == b"" and tiny_bpe.token_bytes(-1) == b""  # the model's padding
    assert tiny_spm.token_bytes(266) == b" he" and tiny_spm.token_bytes(3 + 10) == b"\n"


def test_sentencepiece_space_belongs_to_a_continuation(tiny_spm: Tokenizer) -> None:
    ids = tiny_spm.encode("hello")
    assert tiny_spm.decode(ids) == "hello"
    assert tiny_spm.decode(ids, continuation=True) == " hello"


def test_sentencepiece_without_space_prefix(gguf: Write) -> None:
    tokenizer = load_tokenizer(gguf(spm_metadata(tokenizer__ggml__add_space_prefix=False)))
    assert tokenizer.encode("hello") == [264, 265, 263]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_add_bos_as_the_file_says(gguf: Write) -> None:
    assert load_tokenizer(gguf(bpe_metadata())).encode("h", add_special=True) == [104]
    assert load_tokenizer(gguf(bpe_metadata(tokenizer__ggml__add_bos_token=True))).encode("h", add_special=True) == [259, 104]
    assert load_tokenizer(gguf(spm_metadata())).encode("h", add_special=True) == [1, 259, 260]
    assert load_tokenizer(gguf(spm_metadata(tokenizer__ggml__add_bos_token=False))).encode("h", add_special=True) == [259, 260]


def test_merges_that_spell_a_control_token_are_not_used(gguf: Write) -> None:
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.tokens"][258:260] = ["unused", "hell"]
    tokenizer = load_tokenizer(gguf(metadata))
    assert tokenizer.encode("hello") == [256, 257, ord("o")]
    assert tokenizer.encode("hello", parse_special=True) == [259, ord("o")]


def test_a_piece_that_is_a_control_token_as_a_whole(gguf: Write) -> None:
    """llama-bpe looks whole pieces up before it merges: `!!!` is one piece there."""
    metadata = bpe_metadata(tokenizer__ggml__pre="llama-bpe")
    metadata["tokenizer.ggml.tokens"][259] = "!!!"
    tokenizer = load_tokenizer(gguf(metadata))
    assert tokenizer.encode("!!!") == [33, 33, 33]
    assert tokenizer.encode("!!!", parse_special=True) == [259]


def test_a_character_without_tokens_is_refused_not_dropped(gguf: Write) -> None:
    metadata = bpe_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[4] = "unused"
    with pytest.raises(Unencodable, match="U\\+0004"):
        load_tokenizer(gguf(metadata)).encode("a\x04b")


def test_user_defined_tokens_match_in_any_text(gguf: Write) -> None:
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.token_type"][258] = 4
    metadata["tokenizer.ggml.tokens"][258] = "<think>"
    metadata["tokenizer.ggml.merges"] = ["h e", "l l"]
    tokenizer = load_tokenizer(gguf(metadata))
    assert tokenizer.encode("a<think>b") == [97, 258, 98]
    assert tokenizer.decode([97, 258, 98]) == "a<think>b"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer__ggml__pre": "no-such-cutter"}, "no-such-cutter"),
        ({"tokenizer__ggml__model": "bert"}, "bert"),
        ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"tokenizer__ggml__token_type": [9] * 262}, "tokenizer.ggml.token_type"),
        ({"tokenizer__ggml__merges": ["h"]}, "tokenizer.ggml.merges"),
        ({"tokenizer__ggml__merges": ["no such"]}, "tokenizer"),
        ({"tokenizer__ggml__bos_token_id": 262}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer__ggml__eos_token_id": "2"}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer__ggml__add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
        ({"tokenizer__chat_template": 1}, "tokenizer.chat_template"),
    ],
)
def test_broken_bpe_metadata_is_refused_by_key(gguf: Write, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named.replace(".", "\\.")):
        load_tokenizer(gguf(bpe_metadata(**changes)))


def test_broken_sentencepiece_metadata(gguf: Write) -> None:
    with pytest.raises(FormatError, match="scores"):
        load_tokenizer(gguf(spm_metadata(tokenizer__ggml__scores=[float("nan")] * 267)))
    with pytest.raises(FormatError, match="marked unknown"):
        load_tokenizer(gguf(spm_metadata(tokenizer__ggml__token_type=[2] * 267)))


def test_odd_sentencepiece_vocabularies_load(gguf: Write) -> None:
    """Empty, doubled and NUL pieces, and no unknown token: the library refuses these; the files exist."""
    metadata = spm_metadata()
    metadata["tokenizer.ggml.token_type"][0] = 3
    metadata["tokenizer.ggml.tokens"][263:266] = ["", "he", "\0"]
    tokenizer = load_tokenizer(gguf(metadata))
    assert tokenizer.vocab_size == 267
    assert tokenizer.decode(tokenizer.encode("hello\0")) == "hello\0"
    assert tokenizer.token_bytes(265) == b"\0"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer.json", b"{", "tokenizer.json"),
        ("tokenizer.json", b'{"decoder": {"type": "ByteLevel"}, "pre_tokenizer": {"type": "ByteLevel"}}', "tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}, "decoder": {"type": "WordPiece"}}', "decoder"),
        ("tokenizer.model", b"not a model", "tokenizer.model"),
        ("tokenizer.model", b"", "tokenizer.model"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 2\n", "line 2"),
        ("qwen.tiktoken", b"?? 0\n", "line 1"),
        ("qwen.tiktoken", b"IQ== 0\nIQ== 1\n", "line 2"),
        ("qwen.tiktoken", b"", "no tokens"),
        ("x.gguf", b"GGUF", "x.gguf"),
        ("x.bin", b"", "holds no tokenizer"),
        ("x.txt", b"", "not a tokenizer file"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=named):
        load_tokenizer(tmp_path / name)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match="no such file"):
        load_tokenizer(tmp_path / "tokenizer.json")


def small_tokenizer_json(folder: Path, **settings: Any) -> None:
    """A byte-level tokenizer.json with one control token, and a tokenizer_config.json."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["hello world, hello there"] * 10, trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_directory_settings(tmp_path: Path) -> None:
    added = {"300": {"content": "<|im_end|>", "special": True}}
    small_tokenizer_json(
        tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, add_bos_token=True, chat_template=[{"name": "default", "template": "x"}]
    )
    size = load_tokenizer(tmp_path).vocab_size
    added = {str(size): {"content": "<|im_end|>", "special": True}}
    small_tokenizer_json(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, add_bos_token=True, added_tokens_decoder=added)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, size]}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 0 and tokenizer.eos_id == 1 and tokenizer.eos_ids == {1, size} and tokenizer.add_bos
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [size]
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<|im_end|></s>"))
    assert tokenizer.chat_templates == {"default": "{{ messages }}"}


def test_declared_token_with_another_id(tmp_path: Path) -> None:
    small_tokenizer_json(tmp_path, added_tokens_decoder={"7": {"content": "</s>", "special": True}})
    with pytest.raises(FormatError, match="gives it id 7"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("key", ["add_bos_token", "eos_token"])
def test_broken_tokenizer_config(tmp_path: Path, key: str) -> None:
    small_tokenizer_json(tmp_path, eos_token=3)
    with pytest.raises(FormatError, match="eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("scheme", "second"), [("always", " b"), ("first", "b"), ("never", "b")])
def test_metaspace_prefix_schemes(tmp_path: Path, scheme: str, second: str) -> None:
    """Where the extra space goes is the file's business: before every piece of text, before the first, or nowhere."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "\u2581", "a", "b", "\u2581a", "\u2581b"])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    library.add_special_tokens(["<s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<s>b", parse_special=True) == library.encode("a<s>b").ids
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert tokenizer.token_bytes(tokenizer.encode("a<s>b", parse_special=True)[-1]).decode() == second


def test_a_pattern_that_gives_up_is_an_error_not_a_crash(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), behavior="isolated")
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, tokenizers.pre_tokenizers.ByteLevel(use_regex=False)])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(["x"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Unencodable, match="gave up"):
        load_tokenizer(tmp_path).encode("a" * 40 + "!")


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with a dummy prefix, byte fallback and one user-defined symbol."""
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "hello there", "the world"] * 20),
        model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True, character_coverage=1.0,
        user_defined_symbols=["<think>"], hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder


def test_added_tokens_of_a_sentencepiece_directory(trained_model: Path) -> None:
    size = load_tokenizer(trained_model).vocab_size
    added = {str(size): {"content": "<|im_end|>", "special": True}, str(size + 1): {"content": "<plain>", "special": False}}
    (trained_model / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "legacy": False, "eos_token": "<|im_end|>"})
    )
    tokenizer = load_tokenizer(trained_model)
    assert tokenizer.vocab_size == size + 2 and tokenizer.eos_ids == {size}
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("a<|im_end|></s>"))
    assert size + 1 in tokenizer.encode("hello<plain>world")
    assert tokenizer.decode(tokenizer.encode("hello<plain>world<think>")) == "hello<plain>world<think>"
    ids = tokenizer.encode("hello<|im_end|>hello", parse_special=True)
    at = ids.index(size)
    assert tokenizer.decode(ids[:at], continuation=True) == " hello" and tokenizer.decode(ids[at + 1 :], continuation=True) == "hello"


def seconds(tokenizer: Tokenizer, text: str) -> float:
    """CPU time of this thread: other processes of a busy machine do not count."""
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        tokenizer.encode(text)
        best = min(best, time.thread_time() - start)
    return best


@pytest.mark.parametrize("unit", ["a", " ", "ab ", "\n", "1", "<|im_end|>", "\U0001f999"])
def test_long_text_takes_near_linear_time(load: Callable[[str], Tokenizer], tiny_spm: Tokenizer, unit: str) -> None:
    tokenizers_ = [load("qwen2_5"), load("llama2/tokenizer.model"), tiny_spm]
    for tokenizer in tokenizers_:
        short, long = unit * (8_000 // len(unit)), unit * (128_000 // len(unit))
        # 16 times the text: quadratic would be 256 times the time
        assert seconds(tokenizer, long) < 64 * max(seconds(tokenizer, short), 0.001), (type(tokenizer).__name__, unit)
