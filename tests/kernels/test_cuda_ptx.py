"""The CUDA kernels as nvcc compiles them: their PTX, run by an interpreter (ptx_interpreter), launched by the package's own host code.

test_cuda_emulated.py runs the same sources as the host's compiler understands them. Here it is nvcc's code that runs, with the lines in
assembly that stand in device.h only for it, and every access to memory is checked: that it lies in what the kernel was given, that it is
aligned, that no other warp or block comes between without a barrier, that copies are waited for, that nothing unwritten is used. What this
cannot show is what ptxas makes of the PTX, how the tensor cores round, and time.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from problems import Problem, draw, fused
from test_cuda_emulated import AGAIN, CASES, COMPILER, DTYPES, EMULATOR, FAST, KIB, PARTS, SOURCES, Device, P, _check, device_in_place

INTERPRETER = Path(__file__).parent / "ptx_interpreter"
NVCC = shutil.which("nvcc")

if NVCC is None:
    pytest.skip("there is no nvcc to compile the kernels with", allow_module_level=True)

__all__ = ["device_in_place"]  # the fixture, which takes the device from the one below


class Interpreted(Device):
    """The interpreter's GPU, and the PTX it runs."""

    def __init__(self, library: Path, ptx: list[Path]) -> None:
        super().__init__(library)
        self.ptx = {path.stem: path for path in ptx}
        self._controls.interpreter_load.argtypes = [ctypes.c_char_p]
        self._controls.interpreter_not_understood.restype = ctypes.c_char_p
        for path in ptx:
            self.load(path)

    def load(self, path: Path) -> None:
        self._controls.interpreter_load(str(path).encode())

    def not_understood(self) -> str:
        return self._controls.interpreter_not_understood().decode()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Interpreted:
    import pybind11

    assert NVCC is not None
    folder = tmp_path_factory.mktemp("ptx")
    module = ["-DSTEER_MODULE=_cuda_interpreted", "-DSTEER_TENSORS_DEVICE=steer::Device::kCpu"]  # its tensors are the CPU's
    includes = [f"-I{path}" for path in (SOURCES, EMULATOR, pybind11.get_include(), sysconfig.get_paths()["include"])]
    # Both architectures' PTX is the same. ptxas is not asked, and CUDA's runtime is left out. The host's code is as it is in the package.
    kernels = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-gencode=arch=compute_80,code=compute_80"]
    kernels += ["-cudart=none", "-Xcompiler=-fPIC", '-DSTEER_ARCHITECTURES="interpreted"', "--keep", f"--keep-dir={folder}"]
    bindings = [*COMPILER, "-std=c++17", "-O1", "-fPIC", *module, *includes]
    interpreter = [*COMPILER, "-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fno-math-errno", *includes]
    runtime = [NVCC, "-std=c++20", "-O2", "-Xcompiler=-fPIC", *includes]  # for CUDA's headers, whose place nvcc knows

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, command = job
        target = folder / f"{source.stem}.o"
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True, capture_output=True, text=True)
        return target

    jobs = [(source, kernels) for source in sorted(SOURCES.glob("*.cu"), reverse=True)]  # the longest first
    jobs += [(source, bindings) for source in (SOURCES / "bindings.cpp", SOURCES / "direct.cpp", SOURCES.parent / "tensors.cpp")]
    jobs += [(source, runtime if source.stem == "cuda_runtime" else interpreter) for source in sorted(INTERPRETER.glob("*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "_cuda_interpreted.so"
    # Its own functions of the runtime, also where PyTorch has brought CUDA's.
    subprocess.run([*COMPILER, "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(library)], check=True)
    device = Interpreted(library, sorted(folder.glob("*.ptx")))
    if what := device.not_understood():
        pytest.skip(f"this nvcc writes PTX that the interpreter, made for CUDA 13.0's, does not know: {what}")
    return device


def _name(value: object) -> str:
    return str(value)[6:] if isinstance(value, torch.dtype) else str(value) if isinstance(value, Problem) else ""


@pytest.mark.parametrize("problem, kernels, dtype", [(*case, DTYPES[k % 3]) for k, case in enumerate(CASES + PARTS)], ids=_name)
def test_outputs_and_gradients(problem: Problem, kernels: set[str], dtype: torch.dtype, emulated: Interpreted) -> None:
    emulated.set_order("random", 1)
    _check(problem, dtype, count=2)
    assert set(emulated.take_launched()) == kernels


LONG = [
    (P(frames=90, width=136, num_experts=8, norm="layer", residual=True), FAST),
    (P(batch=2, frames=77, width=72, num_experts=64, norm="rms", pool="max", pool_size=3, top_k=2), AGAIN),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("problem, kernels", LONG, ids=_name)
def test_blocks_that_walk_over_many_tiles(problem: Problem, kernels: set[str], dtype: torch.dtype, emulated: Interpreted) -> None:
    """The next tile's copies come while this one is in use, to the room that the last one had."""
    emulated.set_machine(1, 99 * KIB)
    emulated.set_order("descending")
    _check(problem, dtype, count=1)
    assert set(emulated.take_launched()) == kernels


# --- that the checks can fail -------------------------------------------------------------------------------------------------------------


class Spoiler:
    """The forward's kernel of a bfloat16 stream, with something else in its PTX."""

    def __init__(self, device: Interpreted, folder: Path) -> None:
        self._device, self._file = device, folder / "spoilt.ptx"
        self._text = device.ptx["stream_bfloat16"].read_text()
        entry = re.search(r"\.entry \w+steer_forward_kernelINS0_8BFloat16ES2_\w*\(.*?^}", self._text, re.DOTALL | re.MULTILINE)
        assert entry is not None
        self._start, self._end = entry.span()

    def everywhere(self, pattern: str, replacement: str) -> None:
        spoilt, count = re.subn(pattern, replacement, self._text[self._start : self._end])
        assert count > 0
        self._load(spoilt)

    def in_turn(self, pattern: str, replacement: str) -> Iterator[str]:
        """One place after the other, each ready to run; yields the line of the PTX."""
        kernel = self._text[self._start : self._end]
        for match in re.finditer(pattern, kernel):
            self._load(kernel[: match.start()] + match.expand(replacement) + kernel[match.end() :])
            yield str(self._text.count("\n", 0, self._start + match.start()) + 1)

    def _load(self, kernel: str) -> None:
        self._file.write_text(self._text[: self._start] + kernel + self._text[self._end :])
        self._device.load(self._file)


@pytest.fixture
def spoil(emulated: Interpreted, tmp_path: Path) -> Iterator[Spoiler]:
    emulated.set_machine(1, 99 * KIB)
    yield Spoiler(emulated, tmp_path)
    emulated.load(emulated.ptx["stream_bfloat16"])


def _fault(problem: Problem) -> str:
    try:
        fused(problem, *draw(problem, torch.bfloat16), "cuda")
    except RuntimeError as error:
        return str(error)
    return ""


def test_no_barrier_of_the_forward_can_be_spared(spoil: Spoiler) -> None:
    lines = 0
    for line in spoil.in_turn(r"bar\.sync\s+0;", ""):
        faults = [_fault(problem) for problem, _ in LONG]
        assert any(re.search(r"shared memory .*: \w+\.h:\d+", fault) for fault in faults), f"nobody misses the barrier in line {line}"
        lines += 1
    assert lines >= 6


def test_a_wait_that_is_over_too_early_is_found(spoil: Spoiler) -> None:
    """For the tile before, not for this one."""
    spoil.everywhere(r"cp\.async\.wait_group\s+1;", "cp.async.wait_group 2;")
    assert "where a copy is under way" in _fault(LONG[0][0])


def test_a_warp_that_does_not_wait_for_its_lanes_is_found(spoil: Spoiler) -> None:
    """Where y comes to the place of x, which lanes beyond the last frame have read."""
    spoil.everywhere(r"bar\.warp\.sync\s+-1;", "")
    assert "that another lane has read since the warp's last barrier" in _fault(LONG[0][0])


def test_operands_in_another_order_are_wrong_numbers(spoil: Spoiler) -> None:
    product = r"(mma\.sync\.aligned\.m16n8k16\S+ \{[^}]*\}, )\{(%r\d+),(%r\d+),(%r\d+),(%r\d+)\}"
    spoil.everywhere(product, r"\1{\2,\4,\3,\5}")
    with pytest.raises(AssertionError, match="gates: error"):
        _check(LONG[0][0], torch.bfloat16, count=1)


def test_an_address_that_is_nobodys_is_found(spoil: Spoiler) -> None:
    spoil.everywhere(r"st\.global\.f32\s+\[(%rd\d+)\]", r"st.global.f32 [\1+1099511627776]")
    assert re.search(r"past all that the kernel was given, .*: \w+\.h:\d+", _fault(LONG[0][0]))


def test_a_result_that_is_not_written_is_found(spoil: Spoiler) -> None:
    spoil.everywhere(r"st\.global\.v4\.u32.*;", "")
    assert "y was not written from byte 0 on" in _fault(LONG[0][0])
