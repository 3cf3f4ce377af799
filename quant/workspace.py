"""`convert`: a checkpoint written as the workspace of LMDeploy 0.1, one raw file a tensor and rank.

All or nothing: everything is written into a folder beside the destination, flushed to the disk, and renamed at the end.
What the 28 keys of config.ini cannot say of a model (a sliding window, yarn, norms of q and k) is refused before
anything is written. Serving needs no conversion; this is for what reads TurboMind's files. The drawing of the files is in
`engine/turbomind.py`, the reader in `engine/workspace.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine import awq, turbomind
from engine.errors import ConfigError, ModelError
from engine.models.layers import to_dense
from engine.models.spec import ModelSpec, load_spec
from engine.turbomind import Layout
from engine.weight_files import take_stock
from engine.weights import Checkpoint
from engine.workspace import layout_of, uneven_cut
from formats.errors import FormatError
from formats.workspace import CONFIG, TOKENIZER, WEIGHTS, Value, is_workspace, settings_text
from quant.disk import flush_folders, replace_folder
from quant.disk import write_file as _write
from quant.tokenizer_files import tokenizer_files
from quant.triton_glue import write_glue
from text.tokenizer import load_tokenizer

MODEL_FORMATS = ("hf", "awq", "gguf", "llama", "qwen")  # what --model-format may say; the files say it themselves
SPARE_BYTES = 64 << 20  # of the disk, beyond the weights
TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int4": torch.float16}

# what seed 002's config.ini has for the settings that are not the model's
ENGINE_SETTINGS: dict[str, Value] = {
    "max_batch_size": 64,
    "max_context_token_num": 1,
    "step_length": 1,
    "cache_max_entry_count": 0.5,
    "cache_block_seq_len": 128,
    "cache_chunk_size": 1,
    "use_context_fmha": 1,
    "quant_policy": 0,
}
SESSION_SPARE = 8  # session_len is the trained length and these, as LMDeploy wrote it

Progress = Callable[[int, int, str], None]  # files written, files in all, the name of the last


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert` made. `sentences`: what was changed on the way, for people."""

    path: Path
    ranks: int
    weight_type: str
    files: int
    nbytes: int
    sentences: tuple[str, ...]


def convert(
    model_path: Path | str,
    dst: Path | str,
    *,
    model_name: str,
    tp: int = 1,
    model_format: str = "",
    group_size: int = 0,
    tokenizer_path: Path | str | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the workspace `dst` for `tp` ranks; an older workspace there is replaced, anything else is not.

    `model_path`: what `model.path` may be. `model_format`, `group_size`: checked against the files where given ("", 0:
    as the files say). Raises ModelError, ConfigError, and OSError of the disk, after which nothing is left.
    """
    source, dst = Path(model_path), Path(dst).resolve()
    spec = load_spec(source)
    checkpoint_types = {stored.type for stored in take_stock(source, spec).values()}
    weight_type = "int4" if spec.awq else "bf16" if checkpoint_types == {"BF16"} else "fp16"
    _check_arguments(spec, source, dst, model_name, tp, model_format, group_size)
    layout, settings = layout_of(spec, tp), settings_of(spec, source, tokenizer_path, model_name, tp, weight_type)
    sizes = layout.files()
    _check_space(dst, sum(sizes.values()))
    sentences = _rounding(checkpoint_types, weight_type)
    partial = dst.with_name(f"{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        weights = partial / WEIGHTS
        weights.mkdir(parents=True)
        checkpoint = Checkpoint(take_stock(source, spec))
        for count, (name, array) in enumerate(weight_files(checkpoint, spec, layout, TORCH_TYPES[weight_type]), 1):
            _write(weights / name, _bytes(array, name, sizes))
            if progress:
                progress(count, len(sizes), name)
        checkpoint.finish()
        _copy_tokenizer(source, tokenizer_path, partial / TOKENIZER)
        write_glue(partial)
        _write(weights / CONFIG, settings_text(settings).encode())  # last: without it nothing takes the folder for a workspace
        flush_folders(partial)
        replace_folder(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Converted(dst, tp, weight_type, len(sizes), sum(sizes.values()), sentences)


def settings_of(
    spec: ModelSpec, source: Path, tokenizer_path: Path | str | None, model_name: str, tp: int, weight_type: str
) -> dict[str, Value]:
    """The 28 settings of config.ini, in their order."""
    dynamic = spec.rope.kind == "dynamic"
    trained = spec.rope.original_max_position if dynamic else spec.max_position
    start, end = spec.bos_token_id, next(iter(spec.eos_token_ids), -1)
    if start < 0 or end < 0:
        try:
            tokenizer = load_tokenizer(Path(tokenizer_path or source))
        except FormatError as e:
            raise ModelError(str(e)) from e
        start = start if start >= 0 or tokenizer.bos_id is None else tokenizer.bos_id
        end = end if end >= 0 or tokenizer.eos_id is None else tokenizer.eos_id
    return {
        "model_name": model_name,
        "tensor_para_size": tp,
        "head_num": spec.num_heads,
        "kv_head_num": spec.num_kv_heads,
        "vocab_size": spec.vocab_size,
        "num_layer": spec.num_layers,
        "inter_size": spec.intermediate_size,
        "norm_eps": spec.rms_norm_eps,
        "attn_bias": int(spec.qkv_bias or spec.o_bias),
        "start_id": start,
        "end_id": end,
        "session_len": spec.max_position + SESSION_SPARE,
        "weight_type": weight_type,
        "rotary_embedding": spec.head_dim,
        "rope_theta": spec.rope.theta,
        "size_per_head": spec.head_dim,
        "group_size": spec.awq.group_size if spec.awq else 0,
        **ENGINE_SETTINGS,
        "max_position_embeddings": trained,
        "rope_scaling_factor": spec.rope.factor if dynamic else 0.0,
        "use_logn_attn": int(spec.use_logn_attn),
    }


# --- what is refused ------------------------------------------------------------------------------------------------


def _check_arguments(spec: ModelSpec, source: Path, dst: Path, model_name: str, tp: int, model_format: str, group_size: int) -> None:
    if not model_name or not model_name.isprintable() or model_name != model_name.strip():
        raise ConfigError(f"MODEL_NAME = {model_name!r}: give one word, such as internlm-chat-7b; it chooses the chat template.")
    _check_format(spec, source, model_format)
    if group_size and group_size != (spec.awq.group_size if spec.awq else 0):
        held = f"groups of {spec.awq.group_size}" if spec.awq else "no 4-bit weights"
        raise ConfigError(f"--group-size {group_size}: the checkpoint has {held}; leave it out.")
    if tp < 1:
        raise ConfigError(f"--tp {tp}: at least one rank is needed.")
    if reason := uneven_cut(spec, tp):
        raise ConfigError(f"--tp {tp}: {reason}; use fewer ranks.")
    if reason := _not_sayable(spec):
        raise ModelError(f"{reason}, which config.ini has no key for; serve the checkpoint itself, without converting it")
    if os.path.lexists(dst) and not is_workspace(dst) and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(f"--dst-path {dst}: is there and is no workspace; name another, or remove it.")


def _check_format(spec: ModelSpec, source: Path, model_format: str) -> None:
    if is_workspace(source):
        raise ConfigError(f"{source.name} is a workspace already; convert the checkpoint it was made from.")
    if model_format and model_format not in MODEL_FORMATS:
        raise ConfigError(f"--model-format {model_format}: unknown; known: {', '.join(MODEL_FORMATS)}.")
    if model_format == "llama":
        raise ConfigError(
            "--model-format llama: Meta's .pth files are pickles, which are never opened; take the safetensors of the same model."
        )
    if model_format == "awq" and not spec.awq:
        raise ConfigError("--model-format awq: the checkpoint is not quantized (config.json has no quantization_config); leave it out.")
    if model_format == "gguf" and source.is_dir():
        raise ConfigError(f"--model-format gguf: {source.name} is a folder; name the .gguf file.")
    if model_format == "qwen" and spec.family != "qwen":
        raise ConfigError(f"--model-format qwen: the checkpoint is of the family {spec.family}; leave it out.")


def _not_sayable(spec: ModelSpec) -> str:
    """What of the model config.ini cannot hold, "" if all can be held."""
    rope = spec.rope
    if spec.qk_norm:
        return "q and k have norms of their own"
    if spec.mlp_bias:
        return "the MLP has biases"
    if spec.sliding_window:
        return f"attention has a window of {spec.sliding_window}"
    if rope.freq_factors or rope.kind not in ("default", "dynamic"):
        return f"positions are scaled the {'llama3' if rope.freq_factors else rope.kind} way"
    if rope.rotary_dim not in (0, spec.head_dim):
        return f"{rope.rotary_dim} of {spec.head_dim} dimensions are rotated"
    if spec.hidden_size != spec.num_heads * spec.head_dim:
        return f"{spec.num_heads} heads of {spec.head_dim} dimensions beside a width of {spec.hidden_size}"
    if spec.awq and spec.awq.not_converted:
        return f"{', '.join(spec.awq.not_converted[:4])} stayed dense in a 4-bit checkpoint"
    return ""


def _check_space(dst: Path, nbytes: int) -> None:
    parent = dst.absolute().parent
    try:
        free = shutil.disk_usage(parent).free
    except OSError as e:
        raise ConfigError(f"--dst-path {dst}: {parent.name}: {e.strerror}.") from e
    if free < nbytes + SPARE_BYTES:
        raise ConfigError(
            f"--dst-path {dst}: the workspace takes {(nbytes + SPARE_BYTES) / 2**30:.1f} GiB, {free / 2**30:.1f} are free there."
        )


def _rounding(types: set[str], weight_type: str) -> tuple[str, ...]:
    changed = sorted(types - {"AWQ", {"bf16": "BF16"}.get(weight_type, "F16")})
    return (f"weights stored as {', '.join(changed)} were rounded to {weight_type}",) if changed and weight_type != "int4" else ()


# --- weights --------------------------------------------------------------------------------------------------------


def weight_files(checkpoint: Checkpoint, spec: ModelSpec, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every file, layer after layer: at most a layer's largest weights are in memory."""
    write = _Writer(checkpoint, spec, layout, dtype)
    for i in range(layout.layers):
        base = f"layers.{i}"
        yield f"{base}.attention_norm.weight", write.vector(f"{base}.input_norm")
        yield f"{base}.ffn_norm.weight", write.vector(f"{base}.post_norm")
        for name, ranks in write.layer_int4(base) if layout.group_size else write.layer_dense(base):
            stem, _, suffix = name.rpartition(".")
            for rank, array in enumerate(ranks):
                yield f"{base}.{stem}.{rank}.{suffix}", array
    table = write.table("embed")
    yield "tok_embeddings.weight", table
    yield "output.weight", table if spec.tie_word_embeddings else write.table("lm_head")
    yield "norm.weight", write.vector("final_norm")


class _Writer:
    """Parameters of a checkpoint in TurboMind's order: for each linear the arrays of all ranks."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, layout: Layout, dtype: torch.dtype) -> None:
        self.checkpoint, self.spec, self.layout, self.dtype = checkpoint, spec, layout, dtype

    def vector(self, name: str) -> np.ndarray:
        return self._dense(name)

    def table(self, name: str) -> np.ndarray:
        """[padded vocabulary, hidden]; the rows beyond the vocabulary are zeros."""
        bits = self._dense(name)
        return np.pad(bits, ((0, self.layout.padded_vocab - len(bits)), (0, 0)))

    def layer_dense(self, base: str) -> Iterator[tuple[str, list[np.ndarray]]]:
        yield "attention.w_qkv.weight", self._qkv([self._linear(f"{base}.{n}") for n in "qkv"])
        yield "attention.wo.weight", self._by_inputs(self._linear(f"{base}.o"))
        yield from self._biases(base)
        for name, part in (("w1", "gate"), ("w3", "up")):
            yield f"feed_forward.{name}.weight", self._by_outputs(self._linear(f"{base}.{part}"))
        yield "feed_forward.w2.weight", self._by_inputs(self._linear(f"{base}.down"))

    def layer_int4(self, base: str) -> Iterator[tuple[str, list[np.ndarray]]]:
        parts = {name: self._codes(f"{base}.{name}") for name in ("q", "k", "v", "o", "gate", "up", "down")}
        cuts: dict[str, Callable[[int], list[np.ndarray]]] = {
            "attention.w_qkv": lambda i: self._qkv([parts[n][i] for n in "qkv"]),
            "attention.wo": lambda i: self._by_inputs(parts["o"][i]),
            "feed_forward.w13": lambda i: [
                turbomind.in_turns(*pair) for pair in zip(self._by_outputs(parts["gate"][i]), self._by_outputs(parts["up"][i]), strict=True)
            ],
            "feed_forward.w2": lambda i: self._by_inputs(parts["down"][i]),
        }
        for name, cut in cuts.items():
            codes, zeros, scales = cut(0), cut(1), cut(2)
            yield f"{name}.qweight", [turbomind.encode_s4(np.ascontiguousarray(rank)) for rank in codes]
            yield f"{name}.scales_zeros", [turbomind.encode_scales_zeros(s, z) for s, z in zip(scales, zeros, strict=True)]
        yield from self._biases(base)

    def _biases(self, base: str) -> Iterator[tuple[str, list[np.ndarray]]]:
        if not self.layout.bias:
            return
        spec, none = self.spec, np.zeros
        sizes = [spec.num_heads * spec.head_dim, *2 * [spec.num_kv_heads * spec.head_dim]]
        qkv = [self._bias(f"{base}.{n}") if spec.qkv_bias else none(size, "<u2") for n, size in zip("qkv", sizes, strict=True)]
        yield "attention.w_qkv.bias", [rank[0] for rank in self._qkv([bias[None] for bias in qkv])]
        o = self._bias(f"{base}.o") if spec.o_bias else none(spec.hidden_size, "<u2")  # TurboMind reads it with the others
        yield "attention.wo.bias", [o] * self.layout.ranks

    def _codes(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """4-bit numbers uint8 [in, out], zeros uint8 [in / g, out], scales float16 likewise."""
        weight = self.checkpoint.weight(name)
        if not isinstance(weight, awq.AWQ):
            raise ModelError(f"{name}: is not quantized as the others are")
        return awq.unpack(weight.qweight), awq.unpack(weight.qzeros), weight.scales

    def _linear(self, name: str) -> np.ndarray:
        """[in, out]."""
        return self._dense(name).T

    def _dense(self, name: str) -> np.ndarray:
        return self._bits(to_dense(self.checkpoint.weight(name, dense=True)), name)

    def _bias(self, name: str) -> np.ndarray:
        return self._bits(self.checkpoint.bias(name), name)

    def _qkv(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """q, k, v [R, N] -> of each rank [R, q | k | v], rotated dimensions in pairs."""
        q, k = (turbomind.to_pairs(np.ascontiguousarray(part), self.layout.head_dim) for part in parts[:2])
        shares = [self._by_outputs(part) for part in (q, k, parts[2])]
        return [np.concatenate(rank, axis=1) for rank in zip(*shares, strict=True)]

    def _by_outputs(self, array: np.ndarray) -> list[np.ndarray]:
        return np.split(array, self.layout.ranks, axis=1)

    def _by_inputs(self, array: np.ndarray) -> list[np.ndarray]:
        return np.split(array, self.layout.ranks, axis=0)

    def _bits(self, tensor: torch.Tensor, name: str) -> np.ndarray:
        """uint16: the values as float16 or bfloat16."""
        bits: np.ndarray = tensor.to(self.dtype).contiguous().view(torch.int16).numpy().view("<u2")
        exponent = np.uint16(0x7F80 if self.dtype == torch.bfloat16 else 0x7C00)  # all ones: infinity (the reader let none pass)
        if tensor.dtype != self.dtype and int((bits & exponent).max(initial=0)) == exponent:
            raise ModelError(f"{name}: a number is too large for {self.dtype}; such a model cannot be a {self.dtype} workspace")
        return bits


# --- the disk -------------------------------------------------------------------------------------------------------


def _bytes(array: np.ndarray, name: str, sizes: dict[str, int]) -> memoryview:
    data = np.ascontiguousarray(array)
    if data.nbytes != sizes[name]:
        raise ModelError(f"{name}: {data.nbytes} bytes were made, {sizes[name]} belong there")
    return data.reshape(-1).view(np.uint8).data


def _copy_tokenizer(source: Path, tokenizer_path: Path | str | None, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, data in tokenizer_files(source, tokenizer_path):
        _write(folder / name, data)
