"""What a checkpoint's config.json says of how its linears are quantized, as data: methods, schemes, names that stay dense.

    quant_method          what is read                                                          form of a linear's tensors
    awq                   AutoAWQ's version gemm, 4 bits                                        AWQ
    gptq                  checkpoint_format gptq (v1) and gptq_v2, 4 and 8 bits, any desc_act   GPTQ
    compressed-tensors    pack-quantized int4 and int8; int-quantized W8A8; float-quantized     PACKED, INT8, FP8
    fp8                   e4m3 with one scale a tensor or a block of 128 x 128                   FP8

The tensors themselves are the matter of `engine/quantized_files.py`. No torch, no code and no free regular expression from
the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine.models.keys import Keys
from engine.w4 import GROUP_SIZES
from formats.errors import printable

SUPPORTED = "AWQ (version gemm), GPTQ, compressed-tensors, FP8, 16-bit checkpoints and GGUF files"
BLOCK = 128  # rows and columns of an FP8 block
GROUP_UNIT = 32  # group sizes are multiples of this
MAX_GROUP = 1 << 18

# What an AWQ checkpoint says of itself; hints of how to fuse or to run it do not change what it computes.
AWQ_KEYS = {"quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert", "backend"}
AWQ_HINTS = {"do_fuse", "fuse_max_seq_len", "modules_to_fuse"}
# How GPTQ was made or is to be run elsewhere.
GPTQ_HINTS = {
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse", "hyb_act", "act_group_aware", "meta", "quantizer",
    "model_name_or_path", "model_file_base_name", "backend", "exllama_config", "use_exllama", "disable_exllama", "use_cuda_fp16",
    "tokenizer", "dataset", "batch_size", "max_input_length", "model_seqlen", "pad_token_id", "block_name_to_quantize",
    "module_name_preceding_first_block", "cache_block_outputs", "lm_head", "offload_to_disk", "sym", "desc_act",
}  # fmt: skip
GPTQ_KEYS = {"quant_method", "bits", "group_size", "checkpoint_format", "modules_in_block_to_quantize"}
COMPRESSED_HINTS = {"quantization_status", "global_compression_ratio", "version"}
COMPRESSED_KEYS = {"quant_method", "format", "config_groups", "ignore"}
FORMATS = {"pack-quantized": "PACKED", "int-quantized": "INT8", "float-quantized": "FP8", "naive-quantized": "", "mixed-precision": ""}
WEIGHT_HINTS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder", "dynamic"}
WEIGHT_KEYS = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure"}
FP8_KEYS = {"quant_method", "activation_scheme", "fmt", "weight_block_size", "modules_to_not_convert", "ignored_layers"}

# Patterns of names that are honoured: letters, dots, `.*`, digits, one level of alternatives. Few enough wildcards that no
# name takes long.
ATOM = r"(?:[A-Za-z0-9_\-]|\\\.|(?:\.|\\d|\[[A-Za-z0-9_\-]+\])[*+?]?)"
PATTERN = re.compile(rf"\^?(?:{ATOM}|\((?:\?:)?{ATOM}+(?:\|{ATOM}+)*\))*\$?")
MAX_PATTERN, MAX_WILDCARDS = 200, 3


@dataclass(frozen=True, slots=True)
class AwqSpec:
    """How a checkpoint's linear weights are quantized (`engine/awq.py`)."""

    group_size: int  # 32, 64 or 128 input channels
    zero_point: bool = True  # False: qzeros may be absent; every zero is 8 then
    not_converted: tuple[str, ...] = ()  # a linear whose name in the file contains one of these is dense
    method: str = "awq"

    def scheme(self, linear: str) -> Scheme | None:
        """Of the linear that the file calls so; None: it is dense."""
        return None if any(name in linear for name in self.not_converted) else Scheme("AWQ", 4, self.group_size, zeros=self.zero_point)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weight of a linear lies in the files, and whether its product takes 8-bit activations."""

    form: str  # AWQ, GPTQ, PACKED, INT8, FP8
    bits: int
    group_size: int = 0  # input channels that share a scale; 0: all
    block_rows: int = 1  # output channels that share a scale; 0: all
    zeros: bool = False  # zero points are in the files
    zero_offset: int = 0  # added to the zeros of the files (GPTQ v1)
    activations: bool = False  # 8-bit activations, a scale a token; False: only the weight is quantized
    may_be_dense: bool = False  # a linear may be a dense weight though nothing says so
    targets: tuple[str, ...] = ()  # names and patterns; (): every linear


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How the linears of a checkpoint are quantized, other than by AWQ."""

    method: str
    schemes: tuple[Scheme, ...]
    dense: tuple[str, ...] = ()  # names and patterns of linears that were left as they were

    def scheme(self, linear: str) -> Scheme | None:
        """Of the linear that the file calls so; None: it is dense."""
        if any(_matches(name, linear) for name in self.dense):
            return None
        return next((s for s in self.schemes if not s.targets or any(_matches(target, linear) for target in s.targets)), None)


def _matches(name: str, linear: str) -> bool:
    """A whole name or whole dotted parts of it; `re:` before a pattern that fits its beginning."""
    if name.startswith("re:"):
        return re.match(name.removeprefix("re:"), linear) is not None
    return f".{name}." in f".{linear}."


def quantization_of_config(keys: Keys) -> AwqSpec | QuantSpec | None:
    """None where config.json says nothing; ModelError where it says what is not read."""
    given = keys.table("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method")
    reader = READERS.get(method.lower()) if isinstance(method, str) else None
    if reader is None:
        name = printable(method) if isinstance(method, str) else "an unnamed method"
        keys.fail("quantization_config", f"quantized by {name}, which is not supported; supported: {SUPPORTED}")
    return reader(_within(keys, "quantization_config", given), given)


def _within(keys: Keys, name: str, given: Mapping[str, object]) -> Keys:
    """The keys of an object that lies at `name`."""
    prefix = f"{keys.prefix}{name}."
    return Keys(keys.file, {prefix + k: v for k, v in given.items()}, prefix)


def _awq(keys: Keys, given: Mapping[str, object]) -> AwqSpec:
    for key in given.keys() - AWQ_KEYS - AWQ_HINTS:
        keys.expect(key, False)
    if (version := keys.text("version", "gemm")).lower() != "gemm":
        keys.fail("version", f"{printable(version)} is not supported; supported: gemm")
    if (bits := keys.integer("bits", 1, 64)) != 4:
        keys.fail("bits", f"{bits} is not supported; supported: 4")
    group = keys.integer("group_size", -1, MAX_GROUP)
    if group not in GROUP_SIZES:
        keys.fail(
            "group_size",
            f"{group}{' (one scale for all of an output channel)' if group == -1 else ''} is not supported; supported: 32, 64, 128",
        )
    left = keys.strings("modules_to_not_convert") if keys.has("modules_to_not_convert") else []
    return AwqSpec(group, keys.flag("zero_point", True), tuple(left))


def _gptq(keys: Keys, given: Mapping[str, object]) -> QuantSpec:
    keys.expect("pack_dtype", "int32")
    for key in given.keys() - GPTQ_KEYS - GPTQ_HINTS - {"pack_dtype"}:
        keys.expect(key, False, {}, [])
    layout = keys.text("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        keys.fail("checkpoint_format", f"{printable(layout)} is not supported; supported: gptq, gptq_v2")
    bits = _bits(keys, "bits")
    scheme = Scheme(
        "GPTQ", bits, _group(keys, "group_size"), zeros=True, zero_offset=int(layout == "gptq"),
        may_be_dense=keys.has("modules_in_block_to_quantize"),
    )  # fmt: skip
    return QuantSpec("gptq", (scheme,))


def _bits(keys: Keys, key: str) -> int:
    if (bits := keys.integer(key, 1, 64)) not in (4, 8):
        keys.fail(key, f"{bits} is not supported; supported: 4, 8")
    return bits


def _group(keys: Keys, key: str) -> int:
    """0 where all input channels share a scale (-1 in the file)."""
    group = keys.integer(key, -1, MAX_GROUP)
    if group != -1 and (group == 0 or group % GROUP_UNIT):
        keys.fail(key, f"{group} is not supported; supported: -1 (one scale for all of an output channel) and multiples of {GROUP_UNIT}")
    return max(group, 0)


def _fp8(keys: Keys, given: Mapping[str, object]) -> QuantSpec:
    for key in given.keys() - FP8_KEYS:
        keys.expect(key, False)
    if (fmt := keys.text("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        keys.fail("fmt", f"{printable(fmt)} is not supported; supported: e4m3")
    if (scheme := keys.text("activation_scheme", "dynamic")) not in ("dynamic", "static"):
        keys.fail("activation_scheme", f"{printable(scheme)} is not supported; supported: dynamic, static")
    left = [name for key in ("modules_to_not_convert", "ignored_layers") if keys.has(key) for name in _names(keys, key)]
    block = _is_blocked(keys, "weight_block_size", given)
    group, rows = (BLOCK, BLOCK) if block else (0, 0)
    return QuantSpec("fp8", (Scheme("FP8", 8, group, block_rows=rows, activations=True),), tuple(left))


def _is_blocked(keys: Keys, key: str, given: Mapping[str, object]) -> bool:
    value = given.get(key)
    if value is not None and value not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        keys.fail(key, f"{printable(str(value)[:40])} is not supported; supported: [{BLOCK}, {BLOCK}]")
    return value is not None


def _compressed(keys: Keys, given: Mapping[str, object]) -> QuantSpec:
    for key in ("sparsity_config", "transform_config"):
        keys.expect(key, {}, why="sparse and transformed weights are not supported; take a checkpoint that is only quantized")
    keys.expect("kv_cache_scheme", why="calibrated K/V scales are not read; the cache's precision is cache.quant_policy. Remove this key")
    for key in given.keys() - COMPRESSED_KEYS - COMPRESSED_HINTS - {"sparsity_config", "transform_config", "kv_cache_scheme"}:
        keys.expect(key, False)
    layout = keys.text("format")
    if layout not in FORMATS:
        keys.fail("format", f"{printable(layout)} is not supported; supported: {', '.join(FORMATS)}")
    groups = keys.table("config_groups") or {}
    if not groups:
        keys.fail("config_groups", "missing or empty; it says how the weights are quantized")
    groups_keys = _within(keys, "config_groups", groups)
    schemes = []
    for name in groups:
        table = groups_keys.table(name)
        if table is None:
            groups_keys.fail(name, "null; an object is wanted")
        schemes.append(_config_group(_within(groups_keys, name, table), layout))
    if len(schemes) > 1 and any(not s.targets for s in schemes[:-1]):
        keys.fail("config_groups", "two of its groups are for every Linear")
    return QuantSpec("compressed-tensors", tuple(schemes), tuple(_names(keys, "ignore")) if keys.has("ignore") else ())


def _config_group(keys: Keys, layout: str) -> Scheme:
    keys.expect("output_activations", why="quantized outputs are not supported")
    targets = _names(keys, "targets")
    table = keys.table("weights")
    if table is None:
        keys.fail("weights", "missing; only groups with quantized weights are read")
    weights = _within(keys, "weights", table)
    for key in table.keys() - WEIGHT_KEYS - WEIGHT_HINTS:
        weights.expect(key, False)
    if weights.values.get(weights.prefix + "dynamic") not in (None, False):
        weights.fail("dynamic", "scales of weights that are not in the files are not supported")
    kind, bits = weights.text("type", "int"), _bits(weights, "num_bits")
    form = _form(weights, keys.text("format", layout), kind, bits)
    symmetric = weights.flag("symmetric", True)
    group, rows = _sharing(weights, table, form)
    activations = _takes_8_bits(keys, kind, form)
    if not symmetric and form != "PACKED":
        weights.fail("symmetric", f"false is not supported with {form} weights; supported: true")
    names = () if "Linear" in targets else tuple(targets)
    return Scheme(form, bits, group, rows, zeros=not symmetric, activations=activations, targets=names)


def _form(weights: Keys, layout: str, kind: str, bits: int) -> str:
    if kind not in ("int", "float") or (kind, bits) == ("float", 4):
        weights.fail("type", f"{printable(kind)} of {bits} bits is not supported; supported: int of 4 and 8, float of 8")
    if layout not in FORMATS:
        weights.fail("format", f"{printable(layout)} is not supported; supported: {', '.join(FORMATS)}")
    form = FORMATS[layout] or ("FP8" if kind == "float" else "INT8")
    if (form == "FP8") != (kind == "float") or form == "INT8" and bits != 8:
        weights.fail("num_bits", f"{kind} of {bits} bits does not go with the format {layout}")
    return form


def _sharing(weights: Keys, table: Mapping[str, object], form: str) -> tuple[int, int]:
    """(group_size, block_rows) of a scheme."""
    strategy = weights.text("strategy", "group" if weights.has("group_size") else "tensor")
    allowed = {"PACKED": ("group", "channel"), "INT8": ("channel", "tensor"), "FP8": ("channel", "tensor", "block")}[form]
    if strategy not in allowed:
        weights.fail("strategy", f"{printable(strategy)} is not supported with {form} weights; supported: {', '.join(allowed)}")
    if strategy == "block":
        if not _is_blocked(weights, "block_structure", table):
            weights.fail("block_structure", f"missing; [{BLOCK}, {BLOCK}] is supported")
        return BLOCK, BLOCK
    if strategy == "group":
        return _group(weights, "group_size"), 1
    return 0, int(strategy == "channel")


def _takes_8_bits(keys: Keys, kind: str, form: str) -> bool:
    """Whether inputs are quantized too: of the weight's type, symmetric. Each token gets a scale of its own, which is at least
    as fine as one that was calibrated for all tokens."""
    table = keys.table("input_activations")
    if table is None:
        return False
    inputs = _within(keys, "input_activations", table)
    if form == "PACKED":
        keys.fail("input_activations", "8-bit activations of pack-quantized weights are not supported; supported: null")
    if inputs.integer("num_bits", 1, 64) != 8 or inputs.text("type", "int") != kind or not inputs.flag("symmetric", True):
        keys.fail("input_activations", f"only symmetric ones of 8 bits and of the weights' type ({kind}) are supported")
    return True


def _names(keys: Keys, key: str) -> list[str]:
    """Names, and patterns after `re:`."""
    names = keys.strings(key)
    for name in names:
        pattern = name.removeprefix("re:")
        if pattern == name:
            continue
        wildcards = len(re.findall(r"(?<!\\)[*+?]", pattern))
        if len(pattern) > MAX_PATTERN or wildcards > MAX_WILDCARDS or not PATTERN.fullmatch(pattern):
            wanted = f"letters, dots, .*, digits, up to {MAX_WILDCARDS} wildcards"
            keys.fail(key, f"{printable(name[:80])} is not a pattern that is read ({wanted})")
    return names


READERS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _fp8}
