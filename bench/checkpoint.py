"""Checkpoints of real shapes with random weights: `python -m bench.checkpoint llama-3.1-8b --format awq --out DIR`.

For machines without a network: speed depends on shapes, not on what the weights say. A Hugging Face directory in AWQ's gemm
layout (4 bits, group 128, zero points) or dense 16-bit, one safetensors file a layer, written as a stream by several threads;
the tokenizer beside it has every id, so that the server answers too. Activations stay finite: weights have a spread of about
0.02 whatever their format.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 128
CHUNK_BYTES = 32 << 20
ZEROS = 0x88888888  # the zero point 8 in every nibble
ITEM_BYTES = {"I32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder. `head_dim` 0: hidden / heads."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool = False
    max_position: int = 131072
    head_dim: int = 0

    @property
    def kv_width(self) -> int:
        return self.kv_heads * (self.head_dim or self.hidden // self.heads)

    @property
    def q_width(self) -> int:
        return self.heads * (self.head_dim or self.hidden // self.heads)


SHAPES = {
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 14336, 128256),
    "llama-3.1-70b": Shape(80, 8192, 64, 8, 28672, 128256),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 8192, 128256, tied=True),
    "small": Shape(4, 512, 8, 2, 1536, 8192, max_position=8192),
    "toy": Shape(2, 256, 4, 2, 512, 1024, max_position=2048),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write. `fill`: "bits" (any int32), "scale", "zero", "one", or "normal" (16-bit weights)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: str

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def linear(name: str, n: int, k: int, quantized: bool, dtype: str) -> list[Tensor]:
    """A product's tensors: AWQ's three, or one dense."""
    if not quantized:
        return [Tensor(f"{name}.weight", dtype, (n, k), "normal")]
    return [
        Tensor(f"{name}.qweight", "I32", (k, n // 8), "bits"),
        Tensor(f"{name}.qzeros", "I32", (k // GROUP, n // 8), "zero"),
        Tensor(f"{name}.scales", "F16", (k // GROUP, n), "scale"),
    ]


def files(shape: Shape, quantized: bool, dtype: str) -> list[list[Tensor]]:
    """The tensors of each file: the layers, then what is around them."""
    out = []
    for i in range(shape.layers):
        at = f"model.layers.{i}"
        products = {"q": (shape.q_width, shape.hidden), "k": (shape.kv_width, shape.hidden), "v": (shape.kv_width, shape.hidden)}
        tensors = [t for n, s in products.items() for t in linear(f"{at}.self_attn.{n}_proj", *s, quantized, dtype)]
        tensors += linear(f"{at}.self_attn.o_proj", shape.hidden, shape.q_width, quantized, dtype)
        for name in ("gate", "up"):
            tensors += linear(f"{at}.mlp.{name}_proj", shape.inner, shape.hidden, quantized, dtype)
        tensors += linear(f"{at}.mlp.down_proj", shape.hidden, shape.inner, quantized, dtype)
        norms = ("input_layernorm", "post_attention_layernorm")
        out.append(tensors + [Tensor(f"{at}.{name}.weight", dtype, (shape.hidden,), "one") for name in norms])
    last = [Tensor("model.embed_tokens.weight", dtype, (shape.vocab, shape.hidden), "normal")]
    last += [] if shape.tied else [Tensor("lm_head.weight", dtype, (shape.vocab, shape.hidden), "normal")]
    out.append([*last, Tensor("model.norm.weight", dtype, (shape.hidden,), "one")])
    return out


def random_words(rng: np.random.Generator, count: int, tensor: Tensor) -> np.ndarray:
    """`count` items of the tensor. A 16-bit number gets a random sign and mantissa and one of a few exponents."""
    if tensor.fill == "zero":
        return np.full(count, ZEROS, np.uint32)
    if tensor.fill == "one":
        return np.full(count, 0x3F80 if tensor.dtype == "BF16" else 0x3C00, np.uint16)
    if tensor.fill == "bits":
        return rng.integers(0, 1 << 32, count, np.uint32)
    bits = rng.integers(0, 1 << 16, count, np.uint16)
    if tensor.fill == "scale":
        return (bits & np.uint16(0x3FF)) | np.uint16(0x1800)  # 2^-9 to 2^-8
    if tensor.dtype == "BF16":
        return (bits & np.uint16(0x80FF)) | np.uint16(0x3C00)  # plus or minus 2^-7 to 2^-5
    return (bits & np.uint16(0x87FF)) | np.uint16(0x2000)


def chunks(rng: np.random.Generator, tensor: Tensor) -> Iterator[np.ndarray]:
    count, size = math.prod(tensor.shape), CHUNK_BYTES // ITEM_BYTES[tensor.dtype]
    for start in range(0, count, size):
        yield random_words(rng, min(size, count - start), tensor)


def write_file(path: Path, tensors: list[Tensor], seed: int) -> int:
    """One safetensors file, whole or not at all; its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.Generator(np.random.SFC64(seed))
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            for chunk in chunks(rng, t):
                file.write(chunk.data)
    os.replace(partial, path)
    return at


def config(shape: Shape, quantized: bool, dtype: str) -> dict[str, Any]:
    """A config.json of the Llama family; rope as Llama 3.1 where the positions are as many."""
    out: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.q_width // shape.heads, "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_position, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": shape.tied, "torch_dtype": {"F16": "float16", "BF16": "bfloat16"}[dtype],
        "bos_token_id": shape.vocab - 2, "eos_token_id": shape.vocab - 1,
    }  # fmt: skip
    if shape.max_position == 131072:
        out["rope_scaling"] = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    if quantized:
        out["quantization_config"] = {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm", "modules_to_not_convert": None,
        }  # fmt: skip
    return out


def tokenizer(vocab: int) -> dict[str, Any]:
    """A byte-level tokenizer.json without merges: the 256 bytes, then made-up words, then BOS and EOS."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's spelling of bytes as visible characters
    other = [b for b in range(256) if b not in set(plain)]
    spelled = {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(other)}}
    table = {spelled[b]: b for b in range(256)} | {f"Ġt{i}": i for i in range(256, vocab - 2)}
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level, "post_processor": None,
        "decoder": level,
        "added_tokens": [{"id": vocab - 2, "content": "<s>", **special}, {"id": vocab - 1, "content": "</s>", **special}],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": table | {"<s>": vocab - 2, "</s>": vocab - 1}, "merges": []},
    }  # fmt: skip


def write(out: Path, shape: Shape, quantized: bool, dtype: str, threads: int, seed: int = 0) -> int:
    """The whole directory; bytes of its weights. ValueError where the shape has no whole groups."""
    for width in {shape.hidden, shape.inner, shape.q_width, shape.kv_width} if quantized else ():
        if width % GROUP:
            raise ValueError(f"AWQ in groups of {GROUP} needs widths that are multiples of it, not {width}.")
    out.mkdir(parents=True, exist_ok=True)
    parts = files(shape, quantized, dtype)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(lambda i: write_file(out / names[i], parts[i], seed * 1000 + i), range(len(parts))))
    index = {t.name: name for name, tensors in zip(names, parts, strict=True) for t in tensors}
    end = {"bos_token_id": shape.vocab - 2, "eos_token_id": shape.vocab - 1}
    words = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    for name, value in (
        ("tokenizer.json", tokenizer(shape.vocab)),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | words),
        ("generation_config.json", end),
        ("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}),
        ("config.json", config(shape, quantized, dtype)),  # last: with it the directory is a model
    ):
        (out / name).write_text(json.dumps(value), encoding="utf-8")
    return total


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("shape", choices=sorted(SHAPES))
    p.add_argument("--out", required=True, help="directory to write")
    p.add_argument("--format", choices=("awq", "dense"), default="awq")
    p.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of what is not quantized")
    p.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has; 0: all")
    p.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--keep", action="store_true", help="a directory that holds this very model is left as it is")
    args = p.parse_args(argv)
    shape, out = SHAPES[args.shape], Path(args.out)
    if args.layers < 0 or args.threads < 1:
        p.error("--layers must not be below 0, --threads not below 1")
    if args.layers:
        shape = Shape(args.layers, *(getattr(shape, name) for name in Shape.__slots__[1:]))
    dtype = {"float16": "F16", "bfloat16": "BF16"}[args.dtype]
    if args.keep and (out / "config.json").exists():
        if json.loads((out / "config.json").read_text(encoding="utf-8")) != config(shape, args.format == "awq", dtype):
            p.error("--keep: the directory holds another model")
        print(f"{args.shape}, {args.format}: there already")
        return 0
    began = time.perf_counter()
    try:
        total = write(out, shape, args.format == "awq", dtype, args.threads, args.seed)
    except (ValueError, OSError) as error:
        print(f"bench.checkpoint: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    print(f"{args.shape}, {args.format}: {total / 2**30:.2f} GiB in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
