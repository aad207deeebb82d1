"""The native ops under the compiler's sanitizers, at odd sizes."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "address,undefined"])
def test_no_sanitizer_finds_fault(kind):
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("there is no compiler")
    run = subprocess.run([ROOT / "scripts" / "sanitize", kind], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "pools: done" in run.stdout
