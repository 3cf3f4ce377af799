"""`python -m cli.check_env` on machines that are made up: each thing that can be wrong gives its sentence and exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cli import check_env
from cli.check_env import Probes, Tried
from engine.cards import Card
from engine.errors import DeviceError

GIB = 2**30
H200 = Card("NVIDIA H200", (9, 0), 141 * GIB, 140 * GIB)


@dataclass
class Fake(Probes):
    """A machine with one good card; tests change what they are about."""

    installed: dict[str, str] = field(
        default_factory=lambda: {
            "torch": "2.11", "numba": "0.65", "llvmlite": "0.47", "numpy": "2.4", "numba-cuda": "0.30.4", "nvidia-nvjitlink": "13.0.88",
        }
    )  # fmt: skip
    interpreter: tuple[int, ...] = (3, 11, 7)
    driver: tuple[int, int] | None = (13, 0)
    there: tuple[Card, ...] = (H200,)
    built_for: str | None = "13.0"
    free: int = 64 * GIB
    directory: str = ""
    cpu: Tried | Exception = Tried(1e-7, 0.01)
    cuda: Tried | Exception = Tried(1e-4, 0.6)

    def version(self, package: str) -> str | None:
        return self.installed.get(package)

    def python(self) -> tuple[int, ...]:
        return self.interpreter

    def free_host_bytes(self) -> int:
        return self.free

    def cards(self) -> list[Card]:
        return list(self.there)

    def driver_cuda(self) -> tuple[int, int] | None:
        return self.driver

    def torch_cuda(self) -> str | None:
        return self.built_for

    def try_directory(self, path: Path) -> str:
        return self.directory

    def try_cpu(self) -> Tried:
        return _give(self.cpu)

    def try_cuda(self, index: int, cache_dir: Path) -> Tried:
        return _give(self.cuda)


def _give(what: Tried | Exception) -> Tried:
    if isinstance(what, Exception):
        raise what
    return what


def run(capsys: pytest.CaptureFixture[str], probes: Probes, *words: str) -> tuple[int, str, str]:
    code = check_env.main(list(words), probes)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_good_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, Fake(), "--json")
    assert code == 0 and not err
    found = json.loads(out.strip().splitlines()[-1])
    assert found["ok"] and found["usable"] == ["the CPU", "card 0"]
    assert "NVIDIA H200, compute capability 9.0, 140.0 of 141.0 GiB free" in out and "OK: numbatch can run on the CPU and card 0." in out


def test_without_a_gpu_the_cpu_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, Fake(driver=None, there=(), built_for=None))
    assert code == 0 and "no NVIDIA driver: the CPU engine only" in out and "OK: numbatch can run on the CPU." in out
    code, _, err = run(capsys, Fake(driver=None, there=(), built_for=None), "--set", "engine.device=cuda")
    assert code == 4 and "set engine.device = 'cpu'" in err


WRONG: list[tuple[Fake, str]] = [
    (Fake(driver=(12, 8)), "Update the NVIDIA driver to one for CUDA 13.0"),
    (Fake(driver=(12, 8)), "assembled by nvJitLink 13.0, the driver is for CUDA 12.8"),
    (Fake(driver=None), "libcuda"),
    (Fake(there=()), "the driver shows none"),
    (Fake(there=(Card("Tesla P100", (6, 0), 16 * GIB, 16 * GIB),)), "compute capability 7.5 (Turing)"),
    (Fake(there=(Card("NVIDIA H200", (9, 0), 141 * GIB, GIB // 2),)), "At least 1 GiB of it must be free"),
    (Fake(built_for=None), "built without CUDA"),
    (Fake(built_for="14.1"), "built for CUDA 14.1, the driver is for CUDA 13.0"),
    (Fake(cuda=DeviceError("The CUDA driver failed at loading rms_norm: CUDA_ERROR_INVALID_IMAGE.")), "CUDA_ERROR_INVALID_IMAGE"),
    (Fake(cuda=Tried(0.5, 0.1)), "differs from the reference by 0.5"),
    (Fake(cuda=Tried(float("nan"), 0.1)), "differs from the reference by nan"),
    (Fake(cuda=RuntimeError("the assembler refused a kernel")), "the assembler refused a kernel"),
    (Fake(interpreter=(3, 10, 1)), "Python 3.11 or newer"),
    (Fake(free=GIB // 4), "At least 1 GiB must be free"),
    (Fake(directory="Read-only file system"), "engine.kernel_cache_dir"),
]


@pytest.mark.parametrize(("probes", "sentence"), WRONG, ids=[sentence[:30] for _, sentence in WRONG])
def test_what_is_wrong_is_said_with_what_to_change(capsys: pytest.CaptureFixture[str], probes: Fake, sentence: str) -> None:
    code, out, err = run(capsys, probes)
    assert code == 4 and sentence in err and "BAD" in out


def test_a_broken_card_does_not_matter_to_who_wants_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, Fake(driver=(11, 8)), "--set", "engine.device=cpu")
    assert code == 0 and "BAD kernels" in out
    code, _, err = run(capsys, Fake(cpu=RuntimeError("illegal instruction")), "--set", "engine.device=cpu")
    assert code == 4 and "illegal instruction" in err
    code, _, _ = run(capsys, Fake(cpu=RuntimeError("illegal instruction")))  # the card is what would be used
    assert code == 0


def test_no_numba_cuda_beside_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    probes = Fake()
    del probes.installed["numba-cuda"]
    code, _, err = run(capsys, probes)
    assert code == 4 and "numbatch[cuda]" in err


def test_the_real_machine_computes(tmp_path: Path) -> None:
    probes = Probes()
    assert probes.try_cpu().error < 1e-4
    assert probes.try_directory(tmp_path / "a" / "b") == "" and (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    assert probes.try_directory(tmp_path / "file" / "b") != ""
    assert probes.cores() >= 1 and probes.free_host_bytes() > 0 and probes.python() >= (3, 11)


def test_the_kernel_of_the_card_check_is_right_in_the_emulator(tmp_path: Path) -> None:
    pytest.importorskip("numba_cuda")
    from tests.ptx.device import EmulatedDevice

    assert check_env.norm_on(EmulatedDevice(), tmp_path).error < 2e-3


def test_a_configuration_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, Fake(), "--set", "engine.device=tpu")
    assert code == 2 and "engine.device" in err


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str], smollm2: Path) -> None:
    machine = Fake(driver=None, there=())
    code, out, _ = run(capsys, machine, "--set", f"model.path={smollm2}", "--set", "engine.device=cpu")
    assert code == 0 and "its memory plan fits" in out
    code, _, err = run(
        capsys, machine, "--set", f"model.path={smollm2}", "--set", "engine.device=cpu", "--set", "cache.cache_max_entry_count=0.000001"
    )
    assert code == 4 and "cache.cache_max_entry_count" in err
