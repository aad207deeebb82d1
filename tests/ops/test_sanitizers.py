"""The native ops under the compiler's sanitizers, at odd sizes."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


compiled = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="there is no compiler")


@pytest.mark.slow
@compiled
def test_no_race_in_the_hand_over():
    run = subprocess.run(
        [ROOT / "scripts" / "sanitize-handover", "thread", "10000"], capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "10000 crossings, 0 wrong" in run.stdout


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_no_sanitizer_finds_fault(kind):
    run = subprocess.run([ROOT / "scripts" / "sanitize", kind], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "pools: done" in run.stdout
