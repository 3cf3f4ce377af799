"""The model that is quantized: an unquantized checkpoint, or a GGUF file's numbers, and the names its copy's tensors have.

What is written is always a Hugging Face directory: of such a source under the names it had (packed q, k and v stay packed),
of a GGUF file under the names its architecture has there. Knows no quantization.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelError
from engine.models.families import FAMILIES
from engine.models.spec import ModelSpec, RopeSpec, load_spec, spec_from_config
from engine.weight_files import RowPick, Stored, file_name, take_stock
from engine.weights import Checkpoint
from formats.errors import FormatError, printable
from formats.json_file import read_json
from formats.workspace import is_workspace
from quant.forward import SITES, rows_of

# How Llama 3.1's frequencies were scaled; a GGUF file holds only what came of it.
LLAMA3 = tuple(
    {"rope_type": "llama3", "factor": f, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for f in (8.0, 32.0)
)
DENSE = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Emitted:
    """A linear of the copy: `name` in its files, the stack of which it has rows, and which (None: `start` to `stop` - 1)."""

    name: str
    site: str
    start: int
    stop: int
    order: tuple[RowPick, ...] = ()  # of packed q, k, v: where each one's rows lie in the tensor
    biased: bool = False

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def indices(self, sizes: list[int]) -> torch.Tensor:
        """int64 [rows]: row of the stack for each row of the tensor."""
        if not self.order:
            return torch.arange(self.start, self.stop)
        out, base = torch.empty(self.rows, dtype=torch.int64), 0
        for pick, size in zip(self.order, sizes, strict=True):
            row = torch.arange(size)
            out[row // pick.count * pick.stride + pick.start + row % pick.count] = base + row
            base += size
        return out


@dataclass(frozen=True, eq=False)
class Source:
    path: Path
    spec: ModelSpec
    stock: dict[str, Stored]

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.stock)

    @cached_property
    def names(self) -> dict[str, str]:
        return dict(FAMILIES[self.spec.family].names)

    def dense_names(self) -> dict[str, str]:
        """Canonical parameter outside of linears -> its tensor's name: embedding, norms, head."""
        linears = {part for site in SITES for part in rows_of(self.spec, site)}
        return {name: file_name(name, self.names) for name in self.stock if name.split(".")[-2] not in linears}

    def linears(self, layer: int) -> list[Emitted]:
        out = []
        for site in SITES:
            sizes = rows_of(self.spec, site)
            picks = tuple(pick for part in sizes if (pick := self.stock[f"layers.{layer}.{part}.weight"].pick))
            biased = f"layers.{layer}.{next(iter(sizes))}.bias" in self.stock
            if picks:
                name = file_name(f"layers.{layer}.{next(iter(sizes))}.weight", self.names)
                out.append(Emitted(name.removesuffix(".weight"), site, 0, sum(sizes.values()), picks, biased))
                continue
            start = 0
            for part, size in sizes.items():
                name = file_name(f"layers.{layer}.{part}.weight", self.names).removesuffix(".weight")
                out.append(Emitted(name, site, start, start + size, biased=biased))
                start += size
        return out

    @property
    def requantized(self) -> tuple[str, ...]:
        """Block formats that the weights had already."""
        return tuple(sorted({stored.type for stored in self.stock.values()} - set(DENSE)))

    @cached_property
    def fingerprint(self) -> str:
        """Of names, sizes and times of the files and all that the spec says: whether a later start means the same model."""
        digest = hashlib.sha256(repr(dataclasses.replace(self.spec)).encode())
        for path in sorted({Path(stored.file.path) for stored in self.stock.values()}):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def config(self) -> dict[str, Any]:
        """config.json of the copy, without what quantization adds."""
        if self.path.is_dir():
            return read_json(self.path / "config.json")
        return config_of(self.spec, self.path.name)


def open_source(path: Path | str) -> Source:
    """ModelError where it is no model, or quantized by other means than GGUF's."""
    path = Path(path)
    spec = load_spec(path)
    if is_workspace(path):
        raise ModelError(f"{printable(path.name)}: is a TurboMind workspace; quantize the checkpoint it was made from")
    try:
        stock = take_stock(path, spec)
    except FormatError as e:
        raise ModelError(str(e)) from e
    if any(stored.parts for stored in stock.values()):
        raise ModelError(f"{printable(path.name)}: is quantized already; quantize the 16-bit checkpoint it was made from")
    return Source(path, spec, stock)


def config_of(spec: ModelSpec, file: str) -> dict[str, Any]:
    """A config.json that says what a GGUF file says; ModelError where it has no words for it."""
    family = FAMILIES[spec.family]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": spec.family,
        "hidden_act": "silu",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "rope_theta": spec.rope.theta,
        "bos_token_id": spec.bos_token_id if spec.bos_token_id >= 0 else None,
        "eos_token_id": list(spec.eos_token_ids) or None,
        "torch_dtype": spec.dtype,
    }
    if family.bias_keys:
        config |= {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    if spec.rope.rotary_dim not in (0, spec.head_dim):
        config["partial_rotary_factor"] = spec.rope.rotary_dim / spec.head_dim
    scalings = [_scaling(spec.rope)] if not spec.rope.freq_factors else list(LLAMA3)
    for scaling in scalings:
        config |= {"rope_scaling": scaling} if scaling else {}
        if _same(spec, spec_from_config(config, {})):
            return config
    raise ModelError(f"{printable(file)}: what it says of the model has no place in a config.json; quantize the original checkpoint")


def _scaling(rope: RopeSpec) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        scaling |= {
            "original_max_position_embeddings": rope.original_max_position,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
        }
    return scaling


def _same(wanted: ModelSpec, said: ModelSpec) -> bool:
    """Equal in all that is computed; frequencies that are given one by one to the sixth digit."""
    if wanted.rope.freq_factors:
        from engine.models.rope import inverse_frequencies

        theirs, ours = inverse_frequencies(wanted, wanted.max_position), inverse_frequencies(said, wanted.max_position)
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(theirs, ours, strict=True)):
            return False
        said = dataclasses.replace(said, rope=wanted.rope)
    return dataclasses.replace(said, dtype=wanted.dtype) == wanted


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
