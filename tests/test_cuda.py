"""The CUDA kernels without a GPU: they compile for every architecture, and planted faults are found.

Their arithmetic is checked in test_kernels_slices_voxels.py, where the unchanged text runs on the CPU.
"""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_host import engine

from napari_innergs.cuda import _module

ROOT = Path(__file__).parents[1]
FAULTS = (Path(__file__).parent / "cuda_host" / "faults.cu").read_text()
MAIN = """
#include <cstdio>
int main(int count, char** words) {
    const std::string wanted = words[1];
    const int fault = atoi(words[2]), size = 64;
    float *values = (float*)calloc(size, 4), *out = (float*)calloc(size, 4);
    const char* error = host::launch(2, size, [=] {
        if (wanted == "out_of_bounds") out_of_bounds(values, size, 4 * fault, out);
        if (wanted == "missing_barrier") missing_barrier(values, size, fault, out);
        if (wanted == "divergent_barrier") divergent_barrier(values, size, fault, out);
        if (wanted == "divergent_shuffle") divergent_shuffle(values, size, fault, out);
        if (wanted == "overflow") overflow(values, size, fault, out);
    });
    if (error) { fprintf(stderr, "host: %s\\n", error); return 3; }
    free(values);
    free(out);
}
"""
CHECKS = {
    "plain": ("-O1",),
    "memory": ("-O1", "-DHOST_UCONTEXT", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "threads": ("-O1", "-DHOST_THREADS", "-fsanitize=thread", "-pthread"),
}


def registers():
    spec = importlib.util.spec_from_file_location(
        "registers", ROOT / "benchmarks" / "kernels" / "registers.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_compiles_for_every_architecture_without_spills():
    tool = registers()
    rows = tool.table()
    assert {row["architecture"] for row in rows} == set(tool.ARCHITECTURES)
    assert {row["kernel"] for row in rows} == {
        k for name in _module.SOURCES for k in _module.signatures(name)
    }
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= tool.MOST_REGISTERS, row


def test_a_text_that_is_wrong_does_not_compile():
    tool = registers()
    with pytest.raises(RuntimeError, match="undefined"):
        tool.compile_text('extern "C" __global__ void k() { nothing(); }', ["--gpu-architecture=sm_90"])


@pytest.mark.parametrize(
    ("check", "kernel", "words"),
    [
        ("plain", "divergent_barrier", "host:"),
        ("plain", "divergent_shuffle", "host:"),
        ("memory", "out_of_bounds", "heap-buffer-overflow"),
        ("memory", "overflow", "overflow"),
        ("threads", "missing_barrier", "data race"),
    ],
)
def test_planted_faults_are_found(check, kernel, words):
    program = engine.build(FAULTS + MAIN, CHECKS[check], f"faults-{check}")
    results = [
        subprocess.run([program, kernel, fault], capture_output=True, text=True, timeout=60) for fault in "01"
    ]
    assert results[0].returncode == 0, results[0].stderr
    assert results[1].returncode != 0
    assert words in results[1].stderr


def test_arguments_are_checked_against_the_signature():
    good = torch.zeros(32), torch.zeros(32)
    assert len(_module.convert("probe", "probe", good)) == 2
    with pytest.raises(TypeError, match="takes 2 arguments, not 1"):
        _module.convert("probe", "probe", good[:1])
    with pytest.raises(TypeError, match=r"contiguous tensor of torch\.float32"):
        _module.convert("probe", "probe", (good[0].double(), good[1]))
