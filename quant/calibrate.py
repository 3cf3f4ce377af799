"""`lite calibrate`: what a model's linears read and its KV cache holds on a text; `lite kv_qparams`: LMDeploy 0.1's scales of it.

    calibration.safetensors    <linear>.input.absmax, .absmean float32 [K]      of each linear, under its name in the checkpoint
                               layers.N.key.{min,max,absmax}, .value. likewise  float32 [kv_heads, head_dim], keys as rotated
    calibration.json           the text, its hash, the model

numbatch needs neither: AWQ and SmoothQuant look for themselves, and KV scales are found as K and V come. TurboMind's files are
`layers.N.past_kv_scale.R.weight`, one a layer and rank: float32 [k_scale, k_min, v_scale, v_min], of one tensor each.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.version import VERSION
from engine.errors import ConfigError, ModelError
from formats.json_file import read_json
from formats.safetensors import read_safetensors
from quant.corpus import Windows
from quant.disk import Planned, ShardedTensors, alone_in, flush_folders, replace_file, replace_folder, write_file
from quant.forward import Float32Model, rows_of
from quant.job import check_work_dir
from quant.passes import HiddenStates, Observer, Wanted, embed, through_layer
from quant.source import Source, json_bytes
from quant.threads import Pool, one_thread_an_operation

TENSORS, MANIFEST = "calibration.safetensors", "calibration.json"
RANGES = ("min", "max", "absmax")
Progress = Callable[[float, str, float], None]


def calibrate(
    source: Source, windows: Windows, work_dir: Path | str, *, batch_size: int = 1, device: torch.device, progress: Progress | None = None
) -> Path:
    """Write the two files into the folder `work_dir`, which is replaced if it is an earlier calibration."""
    dst = Path(work_dir).resolve()
    check_work_dir(source.path, dst, MANIFEST)
    partial = dst.with_name(f"{dst.name}.partial")
    work = partial / "work"
    shutil.rmtree(partial, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        needed, free = 2 * 4 * windows.ids.size * source.spec.hidden_size, shutil.disk_usage(partial).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 2**30:.2f} GiB are needed for work files, {free / 2**30:.2f} are free", str(dst))
        with alone_in(partial), one_thread_an_operation(device) as pool:
            found = _observe(source, windows, work, batch_size, device, pool, progress)
        shutil.rmtree(work)
        _write(partial, found)
        write_file(partial / MANIFEST, json_bytes(_manifest(source, windows)))
        flush_folders(partial)
        replace_folder(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return dst


def _observe(
    source: Source, windows: Windows, work: Path, batch_size: int, device: torch.device, pool: Pool, progress: Progress | None
) -> dict[str, np.ndarray]:
    spec, found, started = source.spec, {}, time.monotonic()
    samples, seqlen = windows.ids.shape
    states = HiddenStates(work, samples, seqlen, spec.hidden_size)
    model = Float32Model(source.checkpoint(), spec, device, seqlen)
    embed(model, windows.ids, states)
    for index in range(spec.num_layers):
        observer = Observer(Wanted(gram=False, kv=True), device, windows.ids.size, pool)

        def tick(share: float, index: int = index) -> None:
            if progress is not None:
                done = (index + share) / spec.num_layers
                progress(done, f"layer {index + 1} of {spec.num_layers}", (time.monotonic() - started) * (1 - done) / done)

        through_layer(model, model.load(index), states, batch_size, observer, pool, tick)
        seen = observer.inputs()
        for linear in source.linears(index):
            found[f"{linear.name}.input.absmax"] = seen[linear.site].largest.cpu().numpy()
            found[f"{linear.name}.input.absmean"] = seen[linear.site].mean.cpu().numpy()
        for name, letter in (("key", "k"), ("value", "v")):
            found |= {f"layers.{index}.{name}.{what}": observer.kv[letter][what].cpu().numpy() for what in RANGES}
    return found


def _write(folder: Path, found: dict[str, np.ndarray]) -> None:
    tensors = ShardedTensors(folder, {name: Planned("F32", array.shape) for name, array in found.items()}, single=TENSORS)
    try:
        for name, array in found.items():
            tensors.write(name, array)
        tensors.flush()
    finally:
        tensors.close()


def _manifest(source: Source, windows: Windows) -> dict[str, Any]:
    spec = source.spec
    return {
        "made_by": f"numbatch {VERSION}",
        "source": {"name": source.path.name, "family": spec.family},
        "layers": spec.num_layers,
        "kv_heads": spec.num_kv_heads,
        "inputs": sorted({part for site in ("qkv", "o", "gate_up", "down") for part in rows_of(spec, site)}),
        "calibration": {
            "dataset": windows.name, "samples": len(windows.ids), "seqlen": windows.ids.shape[1], "sha256": windows.digest,
        },
    }  # fmt: skip


def kv_qparams(work_dir: Path | str, turbomind_dir: Path | str, *, symmetric: bool = False, ranks: int = 1) -> int:
    """Write a file for each layer and rank into `turbomind_dir`, which must be there; how many. ConfigError where `work_dir` is no
    calibration, or its KV heads cannot be cut into `ranks`."""
    work, out = Path(work_dir), Path(turbomind_dir)
    if not (work / MANIFEST).is_file():
        raise ConfigError(f"--work-dir {work}: holds no {MANIFEST}; numbatch lite calibrate MODEL --work-dir {work} makes it.")
    if not out.is_dir():
        raise ConfigError(f"--turbomind-dir {out}: no such folder; it is WORKSPACE/triton_models/weights.")
    manifest, file = read_json(work / MANIFEST), read_safetensors(work / TENSORS)
    layers, heads = manifest.get("layers"), manifest.get("kv_heads")
    if not isinstance(layers, int) or not isinstance(heads, int):
        raise ModelError(f"{MANIFEST}: layers and kv_heads are missing; calibrate again")
    if ranks < 1 or heads % ranks:
        raise ConfigError(f"--num-tp {ranks}: {heads} K/V heads cannot be cut so.")
    for layer in range(layers):
        ranges = {name: [_shares(file, f"layers.{layer}.{name}.{what}", ranks) for what in RANGES] for name in ("key", "value")}
        for rank in range(ranks):
            numbers = [number for name in ("key", "value") for number in _scale([share[rank] for share in ranges[name]], symmetric)]
            replace_file(out / f"layers.{layer}.past_kv_scale.{rank}.weight", np.array(numbers, "<f4").tobytes())
    return layers * ranks


def _shares(file: Any, name: str, ranks: int) -> list[np.ndarray]:
    if name not in file.tensors:
        raise ModelError(f"{TENSORS}: {name} is missing; calibrate again")
    return np.split(file.raw(name).view("<f4").reshape(file.tensors[name].shape), ranks)


def _scale(ranges: list[np.ndarray], symmetric: bool) -> list[float]:
    """Of min, max and absmax, 8 bits: x = scale q + min, or symmetric x = scale q."""
    low, high, size = ranges
    if symmetric:
        return [float(size.max()) / 127]
    return [(float(high.max()) - float(low.min())) / 255, float(low.min())]
