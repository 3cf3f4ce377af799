"""The stand-in that carries kernel tests to a real card: tried on a "card" that is the emulator, with memory of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("numba_cuda")

from engine.cuda.elementwise import AddRmsNorm, ApplyUpdates
from engine.cuda.launch import Kernel, Library, assemble, to_ptx
from tests.ptx.card import mirrored
from tests.ptx.device import EmulatedDevice
from tests.ptx.emulator import Emulator, Memory


class Elsewhere(EmulatedDevice):
    """Launches take addresses of copies, as a card's would."""

    def load(self, image: bytes, entry: str, kernel: Kernel):  # type: ignore[no-untyped-def]
        emulator, made = Emulator(image.decode()), []

        class Real:
            torch_device = torch.device("cpu")
            synchronize = staticmethod(lambda: made.clear())

        def launch(grid, *values, shared_bytes):  # type: ignore[no-untyped-def]
            memory = Memory()
            for copy in made:
                memory.add(copy)
            whole = (grid, 1, 1) if isinstance(grid, int) else grid
            emulator.launch(entry, grid=whole, block=(kernel.threads, 1, 1), args=list(values), memory=memory, shared_bytes=shared_bytes)

        original = torch.Tensor.to

        def to(tensor, *where, **how):  # type: ignore[no-untyped-def]
            out = original(tensor, *where, **how)
            if how.get("copy"):
                made.append(out)
            return out

        run = mirrored(launch, entry, kernel, Real, self.launches)

        def call(*words, **more):  # type: ignore[no-untyped-def]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "to", to)
                run(*words, **more)

        return call


def test_results_come_back_and_views_stay_views(tmp_path: Path) -> None:
    device = Elsewhere()
    library = Library(device, tmp_path)
    whole, residual = torch.randn(4, 64).to(torch.bfloat16), torch.randn(2, 64)
    x, out = whole[0:2], whole[2:4]  # of one storage
    before, added = whole.clone(), residual.clone()
    AddRmsNorm(library, 64, "bfloat16")(x, residual, torch.ones(64), out, 1e-5)
    assert torch.equal(x, before[0:2])
    assert torch.equal(residual, before[0:2].float() + added)
    assert torch.isfinite(out).all() and not torch.equal(out, before[2:4])
    tables = torch.zeros((3, 4), dtype=torch.int32)
    ApplyUpdates(library)(tables, torch.tensor([[1, 2, 9]], dtype=torch.int32))
    assert tables[1, 2] == 9 and int(tables.sum()) == 9
    assert len(device.launches) == 2


def test_a_kernel_of_another_architecture_can_be_assembled_for_the_card(tmp_path: Path) -> None:
    variant = ApplyUpdates(Library(EmulatedDevice(), tmp_path)).variants[0]
    image, resources = assemble(to_ptx(variant, (8, 0)), (9, 0))
    assert image[:4] == b"\x7fELF" and resources.stack_bytes == 0


def test_wrong_calls_are_refused() -> None:
    kernel = SimpleNamespace(arguments=(1, 2), shared_bytes=16)
    call = mirrored(lambda *_, **__: None, "k", kernel, SimpleNamespace(synchronize=lambda: None), [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="2 arguments, 1 were"):
        call(1, None)
    with pytest.raises(ValueError, match="16 bytes of shared memory, 17"):
        call(1, None, None, shared_bytes=17)
