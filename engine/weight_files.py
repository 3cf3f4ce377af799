"""Which tensor of which file holds which parameter: names, shapes and types checked both ways before anything is read.

Canonical names are the ones of `engine/models/decoder.py`:

    embed   layers.{i}.{input_norm,q,k,v,o,q_norm,k_norm,post_norm,gate,up,down}   final_norm   lm_head

each with `.weight` and, where the spec says so, `.bias`. A quantized weight is one parameter made of several tensors
(`engine/quantized_files.py`); q, k and v may be rows of one tensor (`RowPick`). Headers only, no torch: the memory plan is made from this.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import ModelError
from engine.models.families import BY_KV_HEAD, FAMILIES, GGUF_NAMES, Family
from engine.models.spec import ModelSpec
from engine.quantized_files import drop_zero_bias, is_quantized, join_linear
from engine.stored import DENSE_TYPES, RowPick, Stored
from formats.errors import FormatError, printable
from formats.gguf import GGUFFile, read_gguf
from formats.json_file import read_json
from formats.safetensors import SafetensorsFile, read_safetensors
from formats.workspace import is_workspace, read_workspace

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 32 << 20
MAX_LISTED = 8  # names in a message

# Tensors that may be there and are not parameters: what they hold follows from the spec.
DERIVED = re.compile(
    r"((model|transformer)\.(layers\.\d{1,4}\.(self_attn|attention)\.)?rotary_emb\.inv_freq|rope_freqs\.weight|blk\.\d{1,4}\.attn_rot_embd)"
)


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name with suffix -> shape, in the order of the model."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    matrices = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    matrices |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    biased = set("qkv" if spec.qkv_bias else "") | set("o" if spec.o_bias else "") | ({"gate", "up", "down"} if spec.mlp_bias else set())
    norms = {"input_norm": hidden, "post_norm": hidden} | ({"q_norm": spec.head_dim, "k_norm": spec.head_dim} if spec.qk_norm else {})
    out: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab_size, hidden)}
    for i in range(spec.num_layers):
        out |= {f"layers.{i}.{name}.weight": (width,) for name, width in norms.items()}
        out |= {f"layers.{i}.{name}.weight": shape for name, shape in matrices.items()}
        out |= {f"layers.{i}.{name}.bias": matrices[name][:1] for name in matrices if name in biased}
    out["final_norm.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        out["lm_head.weight"] = (spec.vocab_size, hidden)
    return out


def file_name(canonical: str, names: Mapping[str, str]) -> str:
    """`layers.3.q.weight` -> the tensor's name in a file that uses `names`."""
    *place, part, suffix = canonical.split(".")
    return f"{names[part].format(i=place[1] if place else '')}.{suffix}"


def take_stock(path: Path | str, spec: ModelSpec) -> dict[str, Stored]:
    """Canonical name with suffix -> where it is stored, for exactly the parameters that the spec implies. ModelError where
    a tensor is missing, left over, or of a shape or type that does not fit."""
    path = Path(path)
    try:
        if is_workspace(path):
            from engine.workspace import stock_of_workspace  # which is written with this file

            return stock_of_workspace(read_workspace(path), spec)
        if path.is_dir():
            return _stock_of_directory(path, spec)
        return _stock_of_gguf(read_gguf(path), spec)
    except FormatError as e:
        raise ModelError(str(e)) from e


def _stock_of_gguf(file: GGUFFile, spec: ModelSpec) -> dict[str, Stored]:
    # HF's converter reorders the rows of q and k for this architecture, and for no other of ours
    permuted = FAMILIES[spec.family].permuted_qk
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads} if permuted else {}
    found = {t.name: Stored(file, t.name, t.shape, t.type) for t in file.tensors.values()}
    stock = _match(file.path.name, found, GGUF_NAMES, spec)
    for canonical, s in stock.items():
        if interleaved := heads.get(canonical.split(".")[-2], 0):
            stock[canonical] = Stored(file, s.name, s.shape, s.type, interleaved)
    return stock


def _stock_of_directory(path: Path, spec: ModelSpec) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in _shards(path):
        for t in file.tensors.values():
            if t.name in found:
                raise ModelError(f"{printable(file.path.name)}: {printable(t.name)}: is in {found[t.name].file.path.name} too")
            found[t.name] = Stored(file, t.name, t.shape, t.dtype)
    family = FAMILIES[spec.family]
    if spec.tie_word_embeddings:
        found.pop(file_name("lm_head.weight", family.names), None)  # a copy that some checkpoints carry; the embedding rules
    file = INDEX if (path / INDEX).exists() else SINGLE
    if spec.quant is not None:
        _join_quantized(file, found, spec)
    stock = _match(file, found, family.names, spec, family)
    if family.unit_head and "lm_head.weight" in stock:
        stock["lm_head.weight"] = dataclasses.replace(stock["lm_head.weight"], unit_rows=True)
    return stock


def _picks(spec: ModelSpec, family: Family) -> dict[str, RowPick]:
    """Where q, k and v are in their packed tensor; {} for families that have them apart."""
    if not family.packed_qkv:
        return {}
    heads, kv = spec.num_heads, spec.num_kv_heads
    if family.packed_qkv == BY_KV_HEAD:
        heads, kv = heads // kv, 1  # of each KV head
    rows = [n * spec.head_dim for n in (heads, kv, kv)]
    starts = (0, rows[0], rows[0] + rows[1])
    return {name: RowPick(start, count, sum(rows)) for name, start, count in zip("qkv", starts, rows, strict=True)}


def _tensor_shape(canonical: str, shape: tuple[int, ...], picks: Mapping[str, RowPick]) -> tuple[int, ...]:
    """The shape of the tensor that holds a parameter."""
    pick = picks.get(canonical.split(".")[-2])
    return shape if pick is None else (shape[0] // pick.count * pick.stride, *shape[1:])


def _join_quantized(file: str, found: dict[str, Stored], spec: ModelSpec) -> None:
    """Put one entry, named as a dense weight would be, in the place of a quantized linear's tensors."""
    missing: dict[str, None] = {}
    family = FAMILIES[spec.family]
    picks = _picks(spec, family)
    shapes = expected_shapes(spec)
    for canonical, shape in shapes.items():
        linear = file_name(canonical, family.names).rpartition(".")[0]
        shape = _tensor_shape(canonical, shape, picks)
        if len(shape) != 2 or canonical == "embed.weight" or spec.quant is None or (scheme := spec.quant.scheme(linear)) is None:
            continue
        whole = found.get(f"{linear}.weight")
        if not is_quantized(linear, scheme, found) and (canonical == "lm_head.weight" or scheme.may_be_dense):
            continue  # most checkpoints leave the head as it was, and do not say so
        if whole is not None and whole.parts:
            continue  # q, k and v are one linear
        if whole is not None and whole.type in DENSE_TYPES:
            raise whole.fail("is a dense weight; quantization_config says that this linear is quantized")
        try:
            stored = join_linear(linear, (shape[0], shape[1]), scheme, picks, found)
        except KeyError as absent:
            missing |= dict.fromkeys(absent.args)
            continue
        found[f"{linear}.weight"] = stored
        if f"{canonical.removesuffix('weight')}bias" not in shapes:
            drop_zero_bias(linear, found)
    if missing:
        raise ModelError(f"{printable(file)}: missing: {_listing(list(missing))}")


def _shards(path: Path) -> list[SafetensorsFile]:
    """The directory's safetensors files, checked against their index where there is one."""
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise ModelError(f"{printable(path.name)}: neither {SINGLE} nor {INDEX} is there; other formats of weights are not read")
        return [read_safetensors(path / SINGLE)]
    index = read_json(path / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ModelError(f"{INDEX}:weight_map: missing or not an object")
    for name in set(map(str, index.values())):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", name):
            raise ModelError(f"{INDEX}:weight_map: {printable(name)!r} is not the name of a safetensors file beside the index")
    files = [read_safetensors(path / name) for name in sorted(set(index.values()))]
    for file in files:
        listed = {name for name, place in index.items() if place == file.path.name}
        if odd := sorted(listed ^ file.tensors.keys()):
            raise ModelError(f"{INDEX}:weight_map: does not agree with {file.path.name} about {_listing(odd)}")
    return files


def _match(
    file: str, found: dict[str, Stored], names: Mapping[str, str], spec: ModelSpec, family: Family | None = None
) -> dict[str, Stored]:
    """Both ways: everything expected is there, as expected; nothing else is. `family`: of files that may pack q, k and v."""
    stock: dict[str, Stored] = {}
    missing: dict[str, None] = {}
    picks = _picks(spec, family) if family else {}
    for canonical, shape in expected_shapes(spec).items():
        name = file_name(canonical, names)
        if name not in found:
            missing[name] = None
            continue
        stored, wanted = found[name], _tensor_shape(canonical, shape, picks)
        if stored.shape != wanted:
            raise stored.fail(f"shape {stored.shape}, the model's configuration wants {wanted}")
        _check_type(stored, len(shape))
        stock[canonical] = dataclasses.replace(stored, shape=shape, pick=picks.get(canonical.split(".")[-2]))
    if missing:
        raise ModelError(f"{printable(file)}: missing: {_listing(list(missing))}")
    used = {stored.name for stored in stock.values()} | {f"{stored.name}.weight" for stored in stock.values() if stored.parts}
    if extra := sorted(name for name in found if name not in used and not DERIVED.fullmatch(name)):
        raise ModelError(f"{printable(file)}: tensors that the model's configuration has no use for: {_listing(extra)}")
    return stock


def _check_type(stored: Stored, n_dims: int) -> None:
    if stored.type in DENSE_TYPES or stored.parts or n_dims == 2 and isinstance(stored.file, GGUFFile):
        return
    raise stored.fail(f"type {stored.type} is not supported here; supported: {', '.join(DENSE_TYPES)}")


def _listing(names: list[str]) -> str:
    shown = ", ".join(map(printable, names[:MAX_LISTED]))
    return shown if len(names) <= MAX_LISTED else f"{shown} and {len(names) - MAX_LISTED} more"
