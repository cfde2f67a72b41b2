"""The compiled CUDA kernels, inspected without a GPU: both architectures, no spills, no local memory, the instructions that were meant.

What is read is the module as it was installed. ``-m slow`` compiles the sources again, wherever there is nvcc.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from steermoe_kernels.backends.cuda import _runs_on

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FAST = ("steer_forward_kernel", "steer_backward_kernel", "steer_parameters_kernel", "steer_reduction_kernel")
PRODUCTS = FAST[:3]
ARCHITECTURES = ("sm_80", "sm_90a")


@dataclass(frozen=True)
class Kernel:
    architecture: str
    name: str  # mangled
    registers: int
    stack: int
    local: int
    shared: int

    def is_one_of(self, names: tuple[str, ...]) -> bool:
        return any(re.search(rf"\d+{name}(I|E)", self.name) for name in names)


def _cuobjdump() -> str | None:
    """CUDA's disassembler: the toolkit's, or the one in Triton's wheel."""
    if (installed := shutil.which("cuobjdump")) is not None:
        return installed
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.is_file() else None


@pytest.fixture(scope="module")
def module() -> Path:
    spec = importlib.util.find_spec("steermoe_kernels._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("steermoe_kernels._cuda was not built: no nvcc, or STEERMOE_CUDA=0")
    if _cuobjdump() is None:
        pytest.skip("there is no cuobjdump, neither CUDA's nor Triton's")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def kernels(module: Path) -> list[Kernel]:
    found, architecture, name = [], "", ""
    for line in _run("-res-usage", str(module)):
        if match := re.search(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Kernel(architecture, name, registers, stack, local, shared))
    if not {kernel.architecture for kernel in found} >= set(ARCHITECTURES):
        pytest.skip(f"the module was built for other architectures (STEERMOE_CUDA_ARCHS): {sorted({k.architecture for k in found})}")
    return found


def _run(*arguments: str) -> Iterator[str]:
    tool = _cuobjdump()
    assert tool is not None
    with subprocess.Popen([tool, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0


def test_every_kernel_is_there_for_both_architectures(kernels: list[Kernel]) -> None:
    by_architecture = {name: {k.name for k in kernels if k.architecture == name} for name in ARCHITECTURES}
    assert by_architecture["sm_80"] == by_architecture["sm_90a"]
    # Three streams, and under the two short ones parameters in their type or float32: five of each pass over W and V.
    for name, count in (("steer_forward_kernel", 5), ("steer_backward_kernel", 10), ("steer_parameters_kernel", 6)):
        assert sum(k.is_one_of((name,)) for k in kernels if k.architecture == "sm_80") == count, name


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.stack == kernel.local == 0, f"{kernel} spills"
        assert kernel.registers <= 255


def test_registers_leave_room_for_the_blocks_meant(kernels: list[Kernel]) -> None:
    """Blocks of 256 threads, of which a multiprocessor holds two, or one where a block keeps the gradients' sums in its registers."""
    for kernel in kernels:
        holds_sums = re.search(r"steer_backward_kernel\w+Li3E|steer_parameters_kernel\w+Li16E", kernel.name)
        assert kernel.registers <= (255 if holds_sums else 128), kernel


def test_shared_memory_is_the_launchers_to_give(kernels: list[Kernel]) -> None:
    """No static shared memory but the kilobyte CUDA keeps for itself: what plan.h counts (test_cuda_emulated.py) is all there is."""
    assert all(kernel.shared <= 1024 for kernel in kernels)


def test_the_instructions_that_were_meant(module: Path, kernels: list[Kernel]) -> None:
    """Products on the tensor cores, asynchronous copies, loads and stores of 16 bytes, nothing through local memory, no atomics."""
    counts: dict[tuple[str, str], Counter] = {}
    architecture, current = "", Counter[str]()
    names = sorted({kernel.name for kernel in kernels if kernel.is_one_of(PRODUCTS)})
    for line in _run("-sass", "-fun", ",".join(names), str(module)):
        if line.startswith("\t\t") and "Function :" in line:
            current = counts.setdefault((architecture, line.split(":")[1].strip()), Counter())
        elif match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", line):
            current[match[1]] += 1

    def total(counter: Counter, pattern: str) -> int:
        return sum(count for name, count in counter.items() if re.fullmatch(pattern, name))

    assert {key for key in counts if key[0] in ARCHITECTURES} == {(a, name) for a in ARCHITECTURES for name in names}
    for key, found in counts.items():
        assert total(found, r"HMMA\..*") >= 32, f"{key}: {found}"
        assert total(found, r"LDGSTS\.E\..*128.*") >= 1, f"{key}: {found}"
        assert total(found, r"LDS\.128") >= 8 and total(found, r"STS\.128") >= 8, f"{key}: {found}"
        assert total(found, r"LDG\.E\.128.*") >= 1, f"{key}: {found}"
        if "parameters" in key[1]:  # operands turned over as they are read
            assert total(found, r"LDSM\.16\.MT88\.4") >= 8, f"{key}: {found}"
        else:
            assert total(found, r"STG\.E\.128.*") >= 4, f"{key}: {found}"
        assert total(found, r"(LDL|STL|ATOM|ATOMG|RED)\b.*") == 0, f"{key}: local memory, or atomics: {found}"
        assert total(found, r"(LD|ST)(\..*)?") == 0, f"{key}: addresses of which the compiler does not know the memory: {found}"


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        ("80-real, 90a-real", (8, 0), True),
        ("80-real, 90a-real", (8, 9), True),
        ("80-real, 90a-real", (9, 0), True),
        ("80-real, 90a-real", (7, 5), False),
        ("80-real, 90a-real", (10, 0), False),
        ("86-real", (8, 0), False),
        ("90a", (12, 0), False),
        ("80", (12, 0), True),
        ("80-virtual", (9, 0), True),
    ],
)
def test_which_gpus_a_build_is_for(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert _runs_on(architectures, *capability) is runs


@pytest.mark.slow
@pytest.mark.parametrize("source", ["stream_float32", "stream_float16", "stream_bfloat16", "dispatch"])
def test_the_sources_compile(source: str, tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("there is no nvcc")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ("80", "90a")]
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", '-DSTEER_ARCHITECTURES="both"']
    command = [nvcc, *flags, *targets, "-c", str(SOURCES / f"{source}.cu"), "-o", str(tmp_path / "out.o")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and all(set(numbers) == {"0"} for numbers in spills), report
