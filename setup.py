"""Builds the compiled modules with CMake and Ninja; everything else is in pyproject.toml.

Environment: STEERMOE_CPU=0 leaves the C++ module out (pure Python, backends `reference` and `triton`). STEERMOE_CUDA=1 makes a missing
nvcc an error and 0 skips CUDA; unset, CUDA is built where nvcc is found. STEERMOE_CUDA_ARCHS overrides the architectures, sm_80 and sm_90a.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def wants_cpu() -> bool:
    return os.environ.get("STEERMOE_CPU", "1") != "0"


def wants_cuda() -> bool:
    wish = os.environ.get("STEERMOE_CUDA")
    if wish == "0":
        return False
    if wish == "1" and not wants_cpu():
        sys.exit("error: STEERMOE_CUDA=1 with STEERMOE_CPU=0, which leaves all compiled kernels out: set one of the two")
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc")) is not None
    if wish == "1" and not nvcc:
        sys.exit("error: STEERMOE_CUDA=1, but nvcc is not on the PATH: install the CUDA toolkit, or leave it unset")
    return nvcc and wants_cpu()


def check_compiler() -> None:
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(compiler) for compiler in named or ("c++", "g++", "clang++")):
        what = f"CXX={named[0]} is not there" if named else "no C++ compiler found"
        sys.exit(
            f"error: {what}: install g++ 11 or newer (Debian, Ubuntu: apt install g++), "
            "or set STEERMOE_CPU=0 for a pure-Python install with the backends 'reference' and, on GPUs, 'triton'"
        )


class FreshBuild(build_py):
    """Starts from nothing: a build folder holds what earlier builds from this tree put there, and modules are found by being there."""

    def run(self) -> None:
        for package in self.packages or ():
            built = Path(self.build_lib, *package.split("."))
            if not self.editable_mode and built.resolve() != Path(self.get_package_dir(package)).resolve():
                shutil.rmtree(built, ignore_errors=True)
        for module in {"_cpu", "_cuda"} - set(MODULES):
            with contextlib.suppress(OSError):
                (ROOT / "steermoe_kernels" / (module + sysconfig.get_config_var("EXT_SUFFIX"))).unlink()
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake once for all modules; they land beside the Python files."""

    def run(self) -> None:
        check_compiler()
        super().run()
        # Python started in this folder finds the sources before the installed package: they get the modules, too.
        for module in self.get_outputs():
            with contextlib.suppress(OSError):  # built here already, or a folder that may not be written to
                shutil.copy2(module, ROOT / "steermoe_kernels")

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._cuda"):
            return  # came with the first module
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # An earlier build remembers the CMake, Ninja and pybind11 of its own isolated environment, which is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSTEERMOE_OUTPUT={output}",
        ]
        if wants_cuda():
            configure += ["-DSTEERMOE_CUDA=ON", f"-DSTEERMOE_CUDA_ARCHS={os.environ.get('STEERMOE_CUDA_ARCHS', '')}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except FileNotFoundError as error:
            sys.exit(f"error: {error.filename} not found: install cmake and ninja, or build with pip's isolation on")
        except subprocess.CalledProcessError as error:
            fewer = (
                "STEERMOE_CUDA=0 installs without those for CUDA, STEERMOE_CPU=0 without any"
                if wants_cuda()
                else "STEERMOE_CPU=0 installs without them"
            )
            sys.exit(f"error: building the compiled kernels failed ({' '.join(error.cmd[:2])}): its errors stand above; {fewer}")


MODULES = ["_cpu"] * wants_cpu() + ["_cuda"] * wants_cuda()

setup(
    ext_modules=[Extension(f"steermoe_kernels.{module}", sources=[]) for module in MODULES],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuild},
)
