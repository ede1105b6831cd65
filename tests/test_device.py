"""The one place that decides between CPU and GPU, with what it finds put in its way."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from napari_innergs import device
from napari_innergs.cuda import _module


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends a machine: PyTorch's CUDA version, CuPy's, number of GPUs, probe."""
    device.find_cuda.cache_clear()
    device._try_gpu.cache_clear()
    real = importlib.util.find_spec

    def pretend(torch_cuda="12.8", cupy="12.9", gpus=1, probe=None):
        spec = object() if cupy else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *x: spec if name == "cupy" else real(name, *x)
        )
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)

        def versions():
            if isinstance(cupy, Exception):
                raise cupy
            return {"cupy": "14.0", "cuda": cupy, "driver": "12.8"}

        def run(index):
            if probe is not None:
                raise probe

        monkeypatch.setattr(_module, "versions", versions)
        monkeypatch.setattr(_module, "probe", run)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        about = SimpleNamespace(name="GPU of Theseus", major=9, minor=0, total_memory=8 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)

    yield pretend
    device.find_cuda.cache_clear()
    device._try_gpu.cache_clear()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"cupy": None}, "CuPy is not installed .*cuda12.*cuda13"),
        ({"torch_cuda": None}, "was built without CUDA .install a CUDA build"),
        ({"cupy": ImportError("no libnvrtc\nmore")}, "CuPy can not be used: ImportError: no libnvrtc "),
        ({"cupy": "13.0"}, "PyTorch was built for CUDA 12 and CuPy for CUDA 13 .*install cupy-cuda12x"),
        ({"torch_cuda": "13.0"}, "PyTorch was built for CUDA 13 and CuPy for CUDA 12 .*install cupy-cuda13x"),
        ({"gpus": 0}, "finds no NVIDIA GPU or no driver for CUDA 12.8"),
        (
            {"probe": RuntimeError("wrong image")},
            "test kernel failed on GPU of Theseus .sm_90, 8.0 GiB.: wrong image",
        ),
    ],
)
def test_why_not(machine, what, said):
    machine(**what)
    choice = device.describe_device()
    assert choice.name == "cpu"
    with pytest.raises(RuntimeError, match=said) as error:
        device.describe_device("cuda")
    for sentence in (choice.reason, str(error.value)):
        assert sentence.endswith("."), sentence
        assert "docs/gpu.md" in sentence and "\n" not in sentence
    assert choice.reason.startswith("The CPU is used because ")


def test_a_gpu_is_chosen(machine):
    machine(gpus=2)
    for asked, name in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        choice = device.describe_device(asked)
        assert choice.name == name and "GPU of Theseus" in choice.reason
    assert device.describe_device("cpu").name == "cpu"
    with pytest.raises(RuntimeError, match=r"no GPU number 2 .PyTorch finds 2"):
        device.describe_device("cuda:2")
    for wrong in ("gpu", "cuda:", "cuda:x", "CUDA", "cuda:-1"):
        with pytest.raises(ValueError, match="Unknown device"):
            device.describe_device(wrong)


def test_operators_stay_with_their_tensors(machine):
    cpu, first, second = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1"))
    machine(gpus=2)
    assert device.backend_device("auto", cpu) == "cpu"
    assert device.backend_device("auto", second) == "cuda:1"
    assert device.backend_device("cuda", second) == "cuda:1"
    assert device.backend_device("cuda", cpu) == "cuda:0"
    assert device.backend_device("cuda:1", first) == "cuda:1"
    assert device.backend_device("cpu", second) == "cpu"
    device._try_gpu.cache_clear()
    machine(probe=RuntimeError("broken"))
    assert device.backend_device("auto", first) == "cpu"


def test_the_cpu_loads_neither_torch_nor_cupy():
    code = (
        "import sys\nfrom napari_innergs.device import describe_device\ndescribe_device('cpu')\n"
        "print([x for x in ('torch', 'cupy', 'numba') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_other_errors_stay_what_they_are(monkeypatch):
    error = ValueError("something else")
    assert device.explain_error(error) is error
    full = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Words.")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5, 8))
    said = device.explain_error(full)
    assert isinstance(said, MemoryError)
    assert "(2.00 GiB more were wanted, 5 of 8 bytes are free). Choose a smaller preset" in str(said)


def test_deterministic_mode_is_one_setting():
    assert not device.is_deterministic()
    device.set_deterministic(True)
    try:
        assert device.is_deterministic() and _module.is_deterministic()
    finally:
        device.set_deterministic(False)
