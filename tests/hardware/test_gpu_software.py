import pytest

from thermocline.hardware.gpu_software import gpu_lacks

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
    ],
)
def test_what_is_missing_is_named_with_its_remedy(packages, files, words) -> None:
    lacks = gpu_lacks(packages.get, lambda path: path in files or path.endswith("Python.h"), lambda _: "/usr/bin/gcc")
    assert len(lacks) == len(words)
    for lack, word in zip(lacks, words, strict=True):
        assert word in lack
        assert "; " in lack


def test_what_triton_compiles_its_launchers_with_is_looked_for(monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    (lack,) = gpu_lacks(ALL.get, lambda _: True, lambda _: None)
    assert "no C compiler" in lack
    assert "apt install gcc" in lack
    (lack,) = gpu_lacks(ALL.get, {"/dev/nvidiactl"}.__contains__, lambda _: "/usr/bin/gcc")
    assert "apt install python3-dev" in lack
    monkeypatch.setenv("CC", "icx")
    assert gpu_lacks(ALL.get, lambda _: True, {"icx": "/opt/icx"}.get) == ()


def test_this_installation_is_looked_at() -> None:
    assert all(isinstance(lack, str) for lack in gpu_lacks())
