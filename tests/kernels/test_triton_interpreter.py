"""The shared accuracy matrix on the Triton kernels, through Triton's interpreter: on machines without a GPU, too.

Triton decides when it is imported whether it interprets, so the matrix runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="this process runs the matrix on Triton by itself")
def test_the_accuracy_matrix_in_the_interpreter() -> None:
    matrix = Path(__file__).with_name("test_accuracy.py")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-rf", "-p", "no:cacheprovider", "-k", "triton", str(matrix)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) > 50, run.stdout[-3000:] + run.stderr[-1000:]
    assert run.returncode == 0, run.stdout[-5000:]
