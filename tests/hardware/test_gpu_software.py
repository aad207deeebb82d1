import os
import re

import pytest

from thermocline.hardware.gpu_card import Maker
from thermocline.hardware.gpu_software import gpu_lacks, torch_maker

ALL = {"torch": "2.13.0+cu128", "triton": "3.7.1", "cuda-bindings": "12.9.4"}


@pytest.mark.parametrize(
    ("packages", "files", "words"),
    [
        (ALL, {"/dev/nvidiactl"}, []),
        (ALL | {"torch": "2.13.0+rocm7.0"}, {"/dev/kfd"}, []),
        (ALL, set(), ["no driver"]),
        (ALL | {"torch": None}, {"/dev/nvidiactl"}, ["torch is not installed; pip install 'thermocline"]),
        (ALL | {"torch": "2.13.0+cpu"}, {"/dev/nvidiactl"}, ["built for the CPU only; pip install"]),
        (ALL | {"triton": None}, {"/dev/nvidiactl"}, ["triton is not installed"]),
        (ALL | {"cuda-bindings": None}, {"/dev/nvidiactl"}, ["slower way"]),
        ({}, set(), ["no driver", "torch", "triton"]),
        ({}, {"/dev/kfd"}, ["torch is not installed; pip install --force-reinstall torch .*/rocm", "triton"]),
        (ALL | {"torch": "2.13.0+cpu"}, {"/dev/kfd"}, ["built for the CPU only; .*/rocm"]),
        (ALL, {"/dev/kfd"}, ["is built for NVIDIA's GPUs, and the driver that is loaded is AMD's; .*/rocm"]),
        (ALL | {"torch": "2.13.0+rocm7.0"}, {"/dev/nvidiactl"}, ["built for AMD's GPUs, .*NVIDIA's; .*/cu"]),
        (ALL | {"torch": "2.13.0+rocm7.0", "cuda-bindings": None}, {"/dev/nvidiactl", "/dev/kfd"}, []),
        (ALL | {"torch": "2.9.1+rocm6.4", "triton": None, "pytorch-triton-rocm": "3.5.1"}, {"/dev/kfd"}, []),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(packages, files, words) -> None:
    def exists(path):
        return path in files or path.endswith("Python.h")

    lacks = gpu_lacks(packages.get, exists, lambda _: "/usr/bin/gcc", lambda *_: True)
    assert len(lacks) == len(words)
    for lack, word in zip(lacks, words, strict=True):
        assert re.search(word, lack)
        assert "; " in lack


def test_what_triton_compiles_its_launchers_with_is_looked_for(monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    (lack,) = gpu_lacks(ALL.get, lambda _: True, lambda _: None, lambda *_: True)
    assert "no C compiler" in lack
    assert "apt install gcc" in lack
    (lack,) = gpu_lacks(ALL.get, {"/dev/nvidiactl"}.__contains__, lambda _: "/usr/bin/gcc")
    assert "apt install python3-dev" in lack
    monkeypatch.setenv("CC", "icx")
    assert gpu_lacks(ALL.get, lambda _: True, {"icx": "/opt/icx"}.get, lambda *_: True) == ()


def test_who_may_not_use_amds_driver_is_told_the_groups() -> None:
    packages = ALL | {"torch": "2.13.0+rocm7.0"}
    asked = []

    def allowed(path, mode):
        asked.append((path, mode))
        return False

    (lack,) = gpu_lacks(packages.get, lambda _: True, lambda _: "/usr/bin/gcc", allowed)
    assert "usermod -aG render,video" in lack
    assert asked == [("/dev/kfd", os.R_OK | os.W_OK)]


@pytest.mark.parametrize(
    ("torch", "maker"),
    [
        (None, None),
        ("2.13.0+cpu", None),
        ("2.13.0", Maker.NVIDIA),
        ("2.8.0+cu128", Maker.NVIDIA),
        ("2.9+rocm6.4", Maker.AMD),
    ],
)
def test_whose_gpus_torch_is_built_for(torch, maker) -> None:
    assert torch_maker({"torch": torch}.get) is maker


def test_this_installation_is_looked_at() -> None:
    assert all(isinstance(lack, str) for lack in gpu_lacks())
