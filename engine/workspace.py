"""Serving from a LMDeploy 0.1 workspace: its config.ini as `ModelSpec`, its raw files as a checkpoint's parameters.

Any number of ranks may serve it, whatever it was made for: the ranks' files are joined when they are read. What
config.ini says of the model must agree with the sizes of the files and with the checkpoint's own config.json, of which
the workspace keeps a copy. `engine/turbomind.py` has the drawing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine import turbomind
from engine.errors import ModelError
from engine.models.keys import Keys
from engine.models.spec import AwqSpec, ModelSpec, RopeSpec, spec_from_config
from engine.turbomind import S4_TILE, Layout
from engine.w4 import GROUP_SIZES
from engine.weight_files import Stored, expected_shapes
from formats.errors import FormatError
from formats.files import map_file
from formats.json_file import read_json
from formats.workspace import CONFIG, Workspace

DTYPES = {"fp16": ("float16", "F16"), "bf16": ("bfloat16", "BF16"), "int4": ("float16", "F16")}
UNUSED = "past_kv_scale"  # of LMDeploy 0.1's calibrated KV cache; here scales are found as K and V come
# what config.ini and the checkpoint's config.json both state: key, field, tolerance
STATED_TWICE = {
    "head_num": "num_heads",
    "kv_head_num": "num_kv_heads",
    "vocab_size": "vocab_size",
    "num_layer": "num_layers",
    "inter_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "size_per_head": "head_dim",
}


def spec_of_workspace(workspace: Workspace) -> ModelSpec:
    """The model that config.ini describes; ModelError where it contradicts itself or the checkpoint's config.json."""
    keys = Keys(CONFIG, workspace.settings)
    weight_type = keys.text("weight_type")
    if weight_type not in DTYPES:
        keys.fail("weight_type", f"{weight_type} is not supported; supported: {', '.join(DTYPES)}")
    heads, head_dim = keys.integer("head_num", 1, 2048), keys.integer("size_per_head", 4, 1024)
    bias = keys.integer("attn_bias", 0, 1) == 1
    kv_heads = keys.integer("kv_head_num", 1, heads)
    if heads % kv_heads or head_dim % 2:
        keys.fail("head_num", f"{heads} heads of {head_dim} dimensions cannot share {kv_heads} K/V heads evenly in pairs")
    if keys.integer("rotary_embedding", 1, 1024) != head_dim:
        keys.fail("rotary_embedding", f"{workspace.integer('rotary_embedding')} of {head_dim} dimensions; only whole heads are rotated")
    vocab = keys.integer("vocab_size", 1, 1 << 22)
    spec = ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden_size=heads * head_dim,
        intermediate_size=keys.integer("inter_size", 1, 1 << 18),
        num_layers=keys.integer("num_layer", 1, 1024),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("norm_eps", 1e-12, 1.0),
        max_position=keys.integer("max_position_embeddings", 1, 1 << 24),
        rope=_rope(keys, head_dim),
        qkv_bias=bias,
        o_bias=bias,
        use_logn_attn=keys.integer("use_logn_attn", 0, 1) == 1,
        bos_token_id=keys.integer("start_id", -1, vocab - 1),
        eos_token_ids=_eos(workspace, keys, vocab),
        dtype=DTYPES[weight_type][0],
        quant=_awq(keys, weight_type),
    )
    _check_ranks(keys, spec)
    _compare(workspace, spec)
    return spec


def stock_of_workspace(workspace: Workspace, spec: ModelSpec) -> dict[str, Stored]:
    """Canonical name with suffix -> where it is; ModelError where a file is missing, left over or of the wrong size."""
    layout = layout_of(spec, workspace.integer("tensor_para_size"))
    _check_files(workspace.weights, layout)
    files = WorkspaceFiles(workspace.weights, layout)
    kind = DTYPES[workspace.text("weight_type")][1]
    stock = {}
    for name, shape in expected_shapes(spec).items():
        base, suffix = name.rsplit(".", 1)
        if spec.awq is None or len(shape) == 1 or base in ("embed", "lm_head"):
            stock[name] = Stored(files, name, shape, kind)
            continue
        n, k = shape
        g = spec.awq.group_size
        shapes = {"qweight": ("I32", (k, n // 8)), "qzeros": ("I32", (k // g, n // 8)), "scales": ("F16", (k // g, n))}
        parts = tuple(Stored(files, f"{base}.{part}", size, of) for part, (of, size) in shapes.items())
        stock[name] = Stored(files, base, shape, "AWQ", parts=parts)
    return stock


def layout_of(spec: ModelSpec, ranks: int) -> Layout:
    """The files' numbers for a model that a workspace can hold."""
    return Layout(
        spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size, spec.vocab_size,
        ranks, spec.qkv_bias or spec.o_bias, spec.awq.group_size if spec.awq else 0,
    )  # fmt: skip


def uneven_cut(spec: ModelSpec, ranks: int) -> str:
    """Why the model's files cannot be cut into `ranks`, "" if they can."""
    for what, count in (("heads", spec.num_heads), ("K/V heads", spec.num_kv_heads), ("intermediate channels", spec.intermediate_size)):
        if count % ranks:
            return f"{ranks} ranks cannot have equal parts of {count} {what}"
    if spec.awq is None:
        return ""
    for rows, columns in layout_of(spec, ranks).linears().values():
        if rows % spec.awq.group_size or rows % S4_TILE or columns % S4_TILE:
            return f"a rank's {rows} x {columns} channels are no whole groups of {spec.awq.group_size} and tiles of {S4_TILE}"
    return ""


def _rope(keys: Keys, head_dim: int) -> RopeSpec:
    theta = keys.number("rope_theta", 1.000001, 1e15)
    factor = keys.number("rope_scaling_factor", 0, 1024)
    if factor == 0:
        return RopeSpec(theta=theta, rotary_dim=head_dim)
    if factor < 1:
        keys.fail("rope_scaling_factor", f"{factor:g}: 0 is off, 1 and more is dynamic NTK scaling")
    trained = keys.integer("max_position_embeddings", 1, 1 << 24)
    return RopeSpec(theta=theta, rotary_dim=head_dim, kind="dynamic", factor=factor, original_max_position=trained)


def _eos(workspace: Workspace, keys: Keys, vocab: int) -> tuple[int, ...]:
    end = keys.integer("end_id", -1, vocab - 1)
    ids: tuple[int, ...] = (end,) if end >= 0 else ()
    if (workspace.tokenizer / "generation_config.json").is_file():
        more = read_json(workspace.tokenizer / "generation_config.json")
        ids += Keys("generation_config.json", more).ids("eos_token_id", vocab)
    return tuple(dict.fromkeys(ids))


def _awq(keys: Keys, weight_type: str) -> AwqSpec | None:
    group = keys.integer("group_size", 0, 1024)
    if weight_type != "int4":
        if group:
            keys.fail("group_size", f"{group} with weight_type {weight_type}; it belongs to int4")
        return None
    if group not in GROUP_SIZES:
        keys.fail("group_size", f"{group} is not supported; supported: {', '.join(map(str, GROUP_SIZES))}")
    return AwqSpec(group)


def _check_ranks(keys: Keys, spec: ModelSpec) -> None:
    ranks = keys.integer("tensor_para_size", 1, 64)
    if reason := uneven_cut(spec, ranks):
        keys.fail("tensor_para_size", reason)


def _compare(workspace: Workspace, spec: ModelSpec) -> None:
    """Model attributes may not be changed in config.ini: the checkpoint's config.json says the same."""
    path = workspace.tokenizer / "config.json"
    if not path.is_file():
        return
    config: Mapping[str, object] = read_json(path)
    theirs = spec_from_config(config, {})
    for key, field in STATED_TWICE.items():
        ours, other = getattr(spec, field), getattr(theirs, field)
        if ours != other and abs(ours - other) > 1e-6 * abs(other):
            raise ModelError(f"{CONFIG}:{key}: {ours:g} contradicts the checkpoint's config.json, which says {other:g}; put it back")
    if abs(spec.rope.theta - theirs.rope.theta) > 1e-6 * theirs.rope.theta:
        raise ModelError(f"{CONFIG}:rope_theta: {spec.rope.theta:g} contradicts config.json, which says {theirs.rope.theta:g}; put it back")


def _check_files(folder: Path, layout: Layout) -> None:
    wanted = layout.files()
    for name, size in wanted.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as e:
            raise ModelError(f"{name}: {e.strerror}; the workspace is not whole") from e
        if found != size:
            raise ModelError(f"{name}: {found} bytes, {CONFIG} wants {size}")
    extra = [p.name for p in sorted(folder.iterdir()) if p.name not in wanted and p.name != CONFIG and UNUSED not in p.name]
    if extra:
        raise ModelError(f"{CONFIG} has no use for {len(extra)} files beside it: {', '.join(extra[:8])}")


class WorkspaceFiles:
    """All weight files of a workspace as one source of tensors in Hugging Face's order (`TensorFile`)."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._sizes = layout.files()
        self._codes = lru_cache(maxsize=1)(self._decoded)  # q, k and v, gate and up ask for one after the other

    @property
    def path(self) -> Path:
        return self._folder

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a parameter: [N, K], bias, norm, or a part of an AWQ weight. ModelError where a file has changed."""
        try:
            return np.ascontiguousarray(self._tensor(name)).reshape(-1).view(np.uint8)
        except (FormatError, ValueError) as e:
            raise ModelError(f"{name}: {e}") from e

    def _tensor(self, name: str) -> np.ndarray:
        *place, part, suffix = name.split(".")
        base = ".".join(place)
        whole = {"embed": "tok_embeddings.weight", "lm_head": "output.weight", "final_norm": "norm.weight"}
        whole |= {"input_norm": f"{base}.attention_norm.weight", "post_norm": f"{base}.ffn_norm.weight"}
        if part in whole:
            values = self._file(whole[part], "<u2")
            return values if part.endswith("norm") else values[: self._layout.vocab * self._layout.hidden]
        if suffix in ("weight", "bias"):
            return self._joined(base, part, suffix)
        return self._awq(base, part, suffix)

    def _file(self, name: str, kind: str) -> np.ndarray:
        size = self._sizes[name]
        values = np.frombuffer(map_file(self._folder / name, smallest=size), kind)
        if values.nbytes != size:
            raise ModelError(f"{name}: {values.nbytes} bytes, {CONFIG} wants {size}")
        return values

    def _joined(self, base: str, part: str, suffix: str) -> np.ndarray:
        """A 16-bit linear or its bias, [N, K] or [N]."""
        layout = self._layout
        name = {"o": "attention.wo", "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"}
        linear = name.get(part, "attention.w_qkv")
        rows, columns = layout.linears()[linear]
        files = [f"{base}.{linear}.{rank}.{suffix}" for rank in range(layout.ranks)]
        if suffix == "bias" and part == "o":
            return self._file(files[0], "<u2")
        shares = [self._file(file, "<u2").reshape(-1 if suffix == "weight" else 1, columns) for file in files]
        if part in ("o", "down"):
            return np.concatenate(shares).T
        return np.concatenate([self._columns(share, part) for share in shares], axis=1).T

    def _columns(self, share: np.ndarray, part: str) -> np.ndarray:
        """q, k or v of a rank's w_qkv, in Hugging Face's order; gate and up as they are."""
        if part not in ("q", "k", "v"):
            return share
        q, k, _ = self._layout.qkv
        start, stop = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + 2 * k)}[part]
        taken = share[:, start:stop]
        return taken if part == "v" else turbomind.from_pairs(taken, self._layout.head_dim)

    def _awq(self, base: str, part: str, suffix: str) -> np.ndarray:
        """qweight, qzeros or scales of a 4-bit linear, as AWQ files have them."""
        linear = {"o": "attention.wo", "gate": "feed_forward.w13", "up": "feed_forward.w13", "down": "feed_forward.w2"}
        name = f"{base}.{linear.get(part, 'attention.w_qkv')}"
        kind = "qweight" if suffix == "qweight" else "scales_zeros"
        ranks = self._codes(name, kind)
        if kind == "scales_zeros":
            ranks = [turbomind.decode_scales_zeros(pairs)[suffix == "qzeros"] for pairs in ranks]
        if part in ("gate", "up"):
            ranks = [codes[:, part == "up" :: 2] for codes in ranks]
        joined = np.concatenate([self._columns(codes, part) for codes in ranks], axis=0 if part in ("o", "down") else 1)
        return joined if suffix == "scales" else turbomind.pack_awq(joined)

    def _decoded(self, name: str, kind: str) -> list[np.ndarray]:
        """Of each rank uint8 [in, out], or float16 [in / g, out, 2]."""
        rows, columns = self._layout.linears()[name.split(".", 2)[2]]
        files = [f"{name}.{rank}.{kind}" for rank in range(self._layout.ranks)]
        if kind == "qweight":
            return [turbomind.decode_s4(self._file(file, "<u4"), rows, columns) for file in files]
        return [self._file(file, "<f2").reshape(rows // self._layout.group_size, columns, 2) for file in files]
