"""One NVIDIA card through torch and the driver: memory, one stream, events, graphs, and launches that cost microseconds.

Everything a rank does is queued on one stream, which is also torch's current one. `tests/ptx/device.py` is its stand-in
without a card. Knows no kernel by name.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch

from engine.cuda.launch import EARLY_LAUNCH, Kernel
from engine.errors import DeviceError

OLDEST = (7, 5)  # Turing: what CUDA 13 still compiles for
SLOT = 8  # bytes of an argument


class CudaDevice:
    """Card `index` of this process. DeviceError where there is no usable one."""

    image = "cubin"

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f"engine.device = 'cuda', but {why_not()}")
        if index >= torch.cuda.device_count():
            raise DeviceError(f"engine.tp needs card {index}, but this machine has {torch.cuda.device_count()}; lower engine.tp.")
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.name: str = properties.name
        self.cc: tuple[int, int] = (properties.major, properties.minor)
        self.multiprocessors: int = properties.multi_processor_count
        self._most_shared: int = properties.shared_memory_per_block_optin
        if self.cc < OLDEST:
            raise DeviceError(
                f"{self.name} has compute capability {self.cc[0]}.{self.cc[1]}; the oldest that CUDA 13 compiles for is 7.5 (Turing)."
            )
        self._stream = torch.cuda.Stream(self.torch_device)
        torch.cuda.set_stream(self._stream)
        self._handle = self._stream.cuda_stream

    # -- kernels ----------------------------------------------------------------------------------------------------

    def load(self, image: bytes, entry: str, kernel: Kernel) -> Callable[..., None]:
        from cuda.bindings import driver

        module = _done(driver.cuModuleLoadData(image), f"loading {entry}")
        function = _done(driver.cuModuleGetFunction(module, entry.encode()), f"finding {entry}")
        if kernel.shared_bytes > 48 * 1024:  # more must be asked for
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            room = min(kernel.shared_bytes, self._most_shared)  # a launch may take less than the kernel's most
            _done(driver.cuFuncSetAttribute(function, most, room), f"{entry}: {room} bytes of shared memory")
        return self._launcher(driver, function, entry, kernel)

    def _launcher(self, driver: Any, function: Any, entry: str, kernel: Kernel) -> Callable[..., None]:
        kinds, stream, threads, most_shared = kernel.kinds, self._handle, kernel.threads, kernel.shared_bytes
        layout = struct.Struct("=" + "".join(_PADDED[kind] for kind in kinds))
        buffer = ctypes.create_string_buffer(max(layout.size, SLOT))
        start = ctypes.addressof(buffer)
        places = (ctypes.c_void_p * max(len(kinds), 1))(*(start + SLOT * i for i in range(len(kinds))))
        parameters = ctypes.addressof(places)
        count = len(kinds)
        tensor = torch.Tensor
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        config.blockDimX, config.blockDimY, config.blockDimZ, config.hStream = threads, 1, 1, stream
        if kernel.early and self.cc >= EARLY_LAUNCH:
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        launch = driver.cuLaunchKernelEx

        def call(grid: int | tuple[int, int, int], *arguments: Any, shared_bytes: int = most_shared) -> None:
            if len(arguments) != count:
                raise TypeError(f"{entry} takes {count} arguments, {len(arguments)} were given")
            layout.pack_into(buffer, 0, *[a.data_ptr() if isinstance(a, tensor) else 0 if a is None else a for a in arguments])
            x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
            config.gridDimX, config.gridDimY, config.gridDimZ, config.sharedMemBytes = x, y, z, shared_bytes
            (status,) = launch(config, function, parameters, 0)
            if status:
                raise DeviceError(f"The launch of {entry} on {x} x {y} x {z} thread blocks failed: {status.name}.")

        call.held = (buffer, places, attribute)  # type: ignore[attr-defined]  # the driver reads them at each launch
        return call

    # -- memory, order, graphs ------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the card."""
        return torch.cuda.mem_get_info(self.torch_device)

    def give_back(self) -> None:
        """What torch keeps of freed memory goes back to the driver, so that `memory` tells the truth."""
        self._stream.synchronize()
        torch.cuda.empty_cache()

    def matmul_f32(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        """out float32 [rows, N] = x [rows, K] w [N, K]^T, of 16-bit inputs."""
        torch.ops.aten.mm.dtype_out(x, w.T, torch.float32, out=out)

    @property
    def block_scaling(self) -> bool:
        """Whether cuBLAS multiplies fp8 with a scale a block here."""
        return self.cc == (9, 0) and tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= (12, 9)

    def int_mm(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        """out int32 [rows, N] = x [rows, K] w [N, K]^T of int8; more than 16 rows."""
        torch.ops.aten._int_mm.out(x, w.T, out=out)

    def scaled_mm(
        self, x: torch.Tensor, w: torch.Tensor, scale_x: torch.Tensor, scale_w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """out [rows, N] = (x * scale_x) [rows, K] (w * scale_w^T) [N, K]^T + bias of e4m3. Scales float32 [rows, 1] and [1, N], or
        those of 128 input channels (and 128 rows of w), each lying column after column."""
        torch.ops.aten._scaled_mm.out(x, w.T, scale_x, scale_w, bias, None, out.dtype, False, out=out)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the card reads while the host goes on."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def event(self) -> torch.cuda.Event:
        """Recorded now: done when everything queued so far is."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
        """(what `work` returned, replay): `work` runs once under capture, its launches happen at each replay. Tensors it
        makes live in `pool` (of `graph_pool`) and keep their addresses."""
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        # other threads (NCCL's watchdog) may go on asking the driver things
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = work()
        finally:
            graph.capture_end()
        return result, graph.replay

    def graph_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


_PADDED = {"P": "Q", "q": "q", "Q": "Q", "d": "d", "i": "ixxxx", "I": "Ixxxx", "f": "fxxxx"}


def _done(answer: tuple[Any, ...], what: str) -> Any:
    status, *rest = answer
    if status:
        raise DeviceError(f"The CUDA driver failed at {what}: {status.name}.")
    return rest[0] if rest else None


def why_not() -> str:
    """Why torch sees no card, for the sentence a user reads."""
    if torch.version.cuda is None:
        return "the installed torch is built without CUDA; install numbatch with its cuda extra and a CUDA build of torch."
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
        if status:
            return f"the CUDA driver answers {status.name}; check `nvidia-smi`."
        version = _done(driver.cuDriverGetVersion(), "asking its version")
    except (ImportError, OSError, RuntimeError) as error:
        return f"the CUDA driver cannot be loaded ({error}); install the NVIDIA driver."
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's driver, which is for CUDA "
        f"{version // 1000}.{version % 1000 // 10}; update the driver or install a torch for that version."
    )
