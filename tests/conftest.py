"""Shared by all tests."""

import importlib
import signal

import pytest

#: Backends that are the CUDA kernels: their unchanged text on the CPU, and on a GPU, each in both modes.
HOST = ["host", "host-deterministic"]
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda-deterministic")]


def pytest_configure():
    # background jobs of a shell start with Ctrl-C ignored, and hand that on to what they start
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def use_backend(monkeypatch):
    """Return a function that makes a backend's name known to the operators, or skips the test with the reason.

    "host" runs the CUDA kernels on the CPU through tests/cuda_host; "-deterministic" chooses the kernels that
    give the same bits every time.
    """

    def use(name):
        import torch

        from napari_innergs import device
        from napari_innergs.operators import _dispatch

        if name in ("auto", "cpu", "reference"):
            return
        from napari_innergs.cuda import _module

        kind, _, mode = name.partition("-")
        if kind == "cuda":
            try:
                device.describe_device(kind)
            except RuntimeError as error:
                pytest.skip(str(error))
        else:
            from cuda_host import engine

            engine.compiler()
            monkeypatch.setattr(_module, "launch", engine.launch)
        before = _dispatch.get_backend

        def get_backend(wanted, operator, where):
            if wanted != name:
                return before(wanted, operator, where)
            if kind == "cuda":
                return before("cuda", operator, where)
            module = importlib.import_module(f"napari_innergs.cuda.{operator}")
            return _dispatch.Backend("cuda", module, torch.device("cpu"))

        monkeypatch.setattr(_dispatch, "get_backend", get_backend)
        monkeypatch.setattr(_module, "_deterministic", mode == "deterministic")

    return use
