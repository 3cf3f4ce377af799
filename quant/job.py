"""One quantized copy of a model, from the first look at the disk to the rename: what every method has in common.

    WORK_DIR.partial/model*.safetensors    room for all tensors from the start, filled layer after layer
    WORK_DIR.partial/work/                 hidden states and state.json: how far an earlier start came
    config.json, tokenizer, quantize.json  last; without config.json nothing takes the folder for a model

A layer counts as done when its tensors and the states after it are on the disk. A start with the same model, text, settings
and library goes on after the last such layer and ends with the same bytes; any other start begins anew.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from config.version import VERSION
from engine.errors import ConfigError, ModelError
from engine.models.layers import to_dense
from engine.weight_files import expected_shapes
from engine.weights import Checkpoint
from formats.errors import FormatError
from formats.json_file import read_json
from quant.awq_search import Inputs
from quant.corpus import Windows
from quant.disk import Planned, ShardedTensors, alone_in, flush_folders, replace_file, replace_folder, write_file
from quant.forward import Float32Model, FloatLayer, rows_of
from quant.passes import HiddenStates, Observer, Wanted, embed, through_layer
from quant.source import Source, json_bytes
from quant.threads import Pool, one_thread_an_operation
from quant.tokenizer_files import tokenizer_files

MANIFEST = "quantize.json"
STATE = "state.json"
WORK = "work"
TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FILE_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
CHUNK_ROWS = 4096  # of embedding and head, written at a time
OBSERVING, ROUNDING = 0.6, 0.4  # about how a layer's time is spent

Progress = Callable[[float, str, float], None]  # share of all that is done, what is being done, seconds left


@dataclass(slots=True, eq=False)
class LayerResult:
    """What a method made of a layer: a stack of rounded rows by site, in its own form, and all else that changed."""

    stacks: dict[str, Any]
    norms: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    report: dict[str, dict[str, Any]]  # by site: errors and what was chosen


class Method(Protocol):
    """A way of quantizing linears."""

    name: str
    wanted: Wanted

    @property
    def settings(self) -> dict[str, Any]:
        """For the manifest, and for knowing an earlier start by."""

    def quantization_config(self) -> dict[str, Any]:
        """What config.json gets."""

    def planned(self, rows: int, inputs: int) -> dict[str, Planned]:
        """Tensors of a linear by suffix. ConfigError where it cannot be quantized so."""

    def quantize(self, layer: FloatLayer, seen: dict[str, Inputs], samples: dict[str, torch.Tensor], pool: Pool) -> LayerResult:
        """`seen` is empty where there is no calibration text; `samples`: some rows of each input, if they were wanted."""

    def pack(self, stack: Any, rows: torch.Tensor) -> dict[str, np.ndarray]:
        """The tensors of a linear that has these rows of a stack."""

    def replace(self, layer: FloatLayer, result: LayerResult) -> bool:
        """Put the rounded numbers into `layer`, for the layers after it to see what they will see; False: they see the floats."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a job made. `sentences`: for people."""

    path: Path
    layers: int
    nbytes: int
    source_nbytes: int
    resumed_at: int  # layers that an earlier start had done
    seconds: float
    sentences: tuple[str, ...]


@dataclass(slots=True)
class _State:
    fingerprint: str
    layers: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        replace_file(folder / STATE, json_bytes({name: getattr(self, name) for name in _State.__slots__}))


class Job:
    """`run` makes `work_dir`. `dtype`: of the tensors that stay dense, "float16" or "bfloat16"."""

    def __init__(
        self,
        source: Source,
        method: Method,
        work_dir: Path | str,
        windows: Windows | None,
        *,
        dtype: str,
        batch_size: int = 1,
        device: torch.device | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.method, self.windows, self.dtype, self.batch_size = source, method, windows, dtype, batch_size
        self.dst = Path(work_dir).resolve()
        self.partial = self.dst.with_name(f"{self.dst.name}.partial")
        self.device = device or torch.device("cpu")
        self._progress = progress
        self._started, self._share_at_start = time.monotonic(), 0.0
        self.linears = {layer: source.linears(layer) for layer in range(source.spec.num_layers)}
        self.planned = self._plan()
        check_work_dir(source.path, self.dst)

    def run(self) -> Made:
        """Raises ConfigError, ModelError, and OSError of the disk; then `work_dir` is as it was and what was done is kept."""
        work = self.partial / WORK
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        try:
            with alone_in(self.partial), one_thread_an_operation(self.device) as pool:
                return self._run(work, pool)
        except BlockingIOError:
            raise ConfigError(f"--work-dir {self.dst}: another process is making it just now; wait for it, or stop it.") from None
        except BaseException:
            if not _read_state(work).get("layers"):  # nothing worth keeping
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _run(self, work: Path, pool: Pool) -> Made:
        state = self._resumed(work)
        resumed_at = state.layers
        self._check_space()
        tensors = ShardedTensors(self.partial, self.planned)
        try:
            self._layers(tensors, state, work, pool)
            index = tensors.index()
        finally:
            tensors.close()
        seconds = time.monotonic() - self._started
        self._finish(state, index)
        source_nbytes = sum(stored.file.raw(stored.name).nbytes for stored in self.source.stock.values() if stored.pick is None)
        sentences = self.windows.sentences if self.windows else ()
        if self.source.requantized:
            sentences += (f"the weights were {', '.join(self.source.requantized)} already: a copy of a 16-bit checkpoint would lose less",)
        return Made(self.dst, len(self.linears), tensors.nbytes, source_nbytes, resumed_at, seconds, sentences)

    # --- what there is to write

    def _plan(self) -> dict[str, Planned]:
        spec = self.source.spec
        shapes, dense = expected_shapes(spec), self.source.dense_names()
        kind = FILE_DTYPES[self.dtype]
        out = {dense["embed.weight"]: Planned(kind, shapes["embed.weight"])}
        for layer, linears in self.linears.items():
            out |= {dense[name]: Planned(kind, shapes[name]) for name in dense if name.startswith(f"layers.{layer}.")}
            for linear in linears:
                inputs = shapes[f"layers.{layer}.{next(iter(rows_of(spec, linear.site)))}.weight"][1]
                try:
                    planned = self.method.planned(linear.rows, inputs)
                except ConfigError as error:
                    raise ConfigError(f"{linear.name}: {error}") from None
                out |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in planned.items()}
                if linear.biased:
                    out[f"{linear.name}.bias"] = Planned(kind, (linear.rows,))
        outside = ("final_norm.weight", "lm_head.weight")
        return out | {dense[name]: Planned(kind, shapes[name]) for name in outside if name in shapes}

    def _check_space(self) -> None:
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        wanted = sum(tensor.nbytes for tensor in self.planned.values()) + self._states_nbytes() - there
        free = shutil.disk_usage(self.partial).free
        if wanted > free:
            needed = f"{wanted / 2**30:.2f} GiB are needed for the copy and its work files, {free / 2**30:.2f} are free"
            raise OSError(errno.ENOSPC, needed, str(self.dst))

    def _states_nbytes(self) -> int:
        return 0 if self.windows is None else 2 * 4 * self.windows.ids.size * self.source.spec.hidden_size

    # --- layers

    def _layers(self, tensors: ShardedTensors, state: _State, work: Path, pool: Pool) -> None:
        count = len(self.linears)
        checkpoint = self.source.checkpoint()
        self._share_at_start = state.layers / count
        seqlen = self.windows.ids.shape[1] if self.windows else 1
        model = Float32Model(checkpoint, self.source.spec, self.device, seqlen)
        states = None
        if self.windows is not None:
            samples, seqlen = self.windows.ids.shape
            states = HiddenStates(work, samples, seqlen, self.source.spec.hidden_size)
        if state.layers == 0:
            self._tell(0.0, "embedding")
            self._write_outside(tensors, checkpoint)
            if states is not None and self.windows is not None:
                embed(model, self.windows.ids, states)
        for index in range(state.layers, count):
            report = self._layer(model, index, tensors, states, pool)
            tensors.flush()
            state.layers = index + 1
            state.reports.append(report)
            state.save(work)

    def _layer(self, model: Float32Model, index: int, tensors: ShardedTensors, states: HiddenStates | None, pool: Pool) -> dict[str, Any]:
        count = len(self.linears)
        layer = model.load(index)
        label = f"layer {index + 1} of {count}"
        self._tell(index / count, label)
        seen: dict[str, Inputs] = {}
        samples: dict[str, torch.Tensor] = {}
        if states is not None:
            observer = Observer(self.method.wanted, self.device, states.shape[0] * states.shape[1], pool)

            def tick(share: float) -> None:
                self._tell((index + OBSERVING * share) / count, label)

            through_layer(model, layer, states, self.batch_size, observer, pool, tick)
            seen = observer.inputs()
            samples = {site: torch.cat(rows) for site, rows in observer.rows.items() if rows}
        result = self.method.quantize(layer, seen, samples, pool)
        self._tell((index + OBSERVING + ROUNDING / 2) / count, label)
        self._write_layer(tensors, index, result)
        if states is not None and self.method.replace(layer, result):
            through_layer(model, layer, states, self.batch_size, None, pool, lambda share: None)
        return result.report

    def _write_layer(self, tensors: ShardedTensors, index: int, result: LayerResult) -> None:
        dense = self.source.dense_names()
        for name, norm in result.norms.items():
            tensors.write(dense[f"layers.{index}.{name}.weight"], self._bits(norm, f"layers.{index}.{name}"))
        for linear in self.linears[index]:
            sizes = rows_of(self.source.spec, linear.site)
            rows = linear.indices(list(sizes.values()))
            for suffix, array in self.method.pack(result.stacks[linear.site], rows).items():
                tensors.write(f"{linear.name}.{suffix}", array)
            if linear.biased:
                bias = torch.cat([result.biases[part] for part in sizes])[rows]
                tensors.write(f"{linear.name}.bias", self._bits(bias, linear.name))

    def _write_outside(self, tensors: ShardedTensors, checkpoint: Checkpoint) -> None:
        """Embedding, last norm and output head, some rows at a time."""
        shapes = expected_shapes(self.source.spec)
        for canonical, name in self.source.dense_names().items():
            if canonical.startswith("layers."):
                continue
            for start in range(0, shapes[canonical][0], CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, shapes[canonical][0])
                part = to_dense(checkpoint.weight(canonical.removesuffix(".weight"), rows=slice(start, stop), dense=True))
                tensors.write(name, self._bits(part, canonical), start)

    def _bits(self, tensor: torch.Tensor, name: str) -> np.ndarray:
        """uint16: the values in `dtype`."""
        rounded = tensor.to("cpu", TORCH_DTYPES[self.dtype]).contiguous()
        if not torch.isfinite(rounded).all():
            raise ModelError(f"{name}: a number is too large for {self.dtype}; use --dtype bfloat16")
        bits: np.ndarray = rounded.view(torch.int16).numpy().view(np.uint16)
        return bits

    # --- beginning and end

    def _fingerprint(self) -> str:
        text = self.windows.digest if self.windows else ""
        says = (VERSION, torch.__version__, self.source.fingerprint, self.method.name, self.method.settings, text, self.dtype)
        return hashlib.sha256(repr((*says, self.batch_size, str(self.device))).encode()).hexdigest()

    def _resumed(self, work: Path) -> _State:
        """Of an earlier start with all the same, or a new one."""
        fresh = _State(self._fingerprint())
        found = _read_state(work)
        if found.get("fingerprint") == fresh.fingerprint:
            return _State(fresh.fingerprint, int(found["layers"]), list(found["reports"]))
        for path in self.partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        work.mkdir()
        fresh.save(work)
        return fresh

    def _finish(self, state: _State, index: bytes | None) -> None:
        files = dict(tokenizer_files(self.source.path, hub=True))
        files.pop("config.json", None)
        files[MANIFEST] = json_bytes(self._manifest(state))
        if index is not None:
            files["model.safetensors.index.json"] = index
        config = self.source.config()
        for key in ("torch_dtype", "dtype"):
            config |= {key: self.dtype} if key in config else {}
        config.setdefault("torch_dtype" if "dtype" not in config else "dtype", self.dtype)
        files["config.json"] = json_bytes(config | {"quantization_config": self.method.quantization_config()})
        for name, data in files.items():  # config.json last
            (self.partial / name).unlink(missing_ok=True)
            write_file(self.partial / name, data)
        shutil.rmtree(self.partial / WORK)
        flush_folders(self.partial)
        replace_folder(self.partial, self.dst)

    def _manifest(self, state: _State) -> dict[str, Any]:
        calibration = None
        if self.windows is not None:
            samples, seqlen = self.windows.ids.shape
            calibration = {"dataset": self.windows.name, "samples": samples, "seqlen": seqlen, "sha256": self.windows.digest}
        return {
            "made_by": f"numbatch {VERSION}",
            "method": self.method.name,
            **self.method.settings,
            "dtype": self.dtype,
            "source": {"name": self.source.path.name, "family": self.source.spec.family, "formats": list(self.source.requantized) or None},
            "calibration": calibration,
            "layers": state.reports,
        }

    def _tell(self, share: float, label: str) -> None:
        if self._progress is None:
            return
        here = share - self._share_at_start
        left = (time.monotonic() - self._started) * (1 - share) / here if here > 0 else float("nan")
        self._progress(share, label, left)


def check_work_dir(source: Path, dst: Path, manifest: str = MANIFEST) -> None:
    """ConfigError where writing `dst` would touch the model or something that is not ours (as a `manifest` in it shows)."""
    model = source.resolve()
    if dst == model or dst in model.parents or model in dst.parents:
        raise ConfigError(f"--work-dir {dst}: is the model itself, holds it or lies in it; name another folder.")
    partial = dst.with_name(f"{dst.name}.partial")
    if os.path.lexists(partial) and not (partial.is_dir() and (not any(partial.iterdir()) or _is_ours(partial, manifest))):
        raise ConfigError(f"--work-dir {dst}: {partial.name} beside it is not of this command's making; name another, or remove it.")
    if os.path.lexists(dst) and not (dst.is_dir() and (not any(dst.iterdir()) or (dst / manifest).is_file())):
        raise ConfigError(f"--work-dir {dst}: is there and not of this command's making; name another, or remove it.")


def _is_ours(partial: Path, manifest: str) -> bool:
    return (partial / WORK).is_dir() or (partial / manifest).is_file()


def _read_state(work: Path) -> dict[str, Any]:
    try:
        return read_json(work / STATE, 64 << 20)
    except FormatError:
        return {}
