"""Every CUDA kernel compiles for every architecture, without spills and with room for enough threads."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load():
    spec = importlib.util.spec_from_file_location(
        "registers", ROOT / "benchmarks" / "kernels" / "registers.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["registers"] = module
    spec.loader.exec_module(module)
    return module


registers = load()


@pytest.fixture(scope="module")
def rows():
    return registers.table()


def test_compiler_is_there():
    """No skip where it is missing: the error says what to install."""
    major, minor = (int(x) for x in registers.nvrtc_version().split("."))
    assert (12, 8) <= (major, minor) < (13, 0)  # older ones lack sm_120, newer ones sm_70


@pytest.mark.parametrize("architecture", registers.ARCHITECTURES)
def test_no_spills_and_few_registers(rows, architecture):
    mine = [row for row in rows if row["architecture"] == architecture]
    assert {row["kernel"] for row in mine} == {
        "probe", "prepare", "count_tiles", "list_tiles", "chain", "splat", "gather", "moments",
        "shear_forward", "shear_backward", "adam",
        "project", "splat_views", "count_view_tiles", "list_view_tiles", "gather_views", "sum_views",
        "chain_covs", "chain_means", "chain_frames",
        "prepare_splats", "count_splat_tiles", "list_splat_tiles", "draw_tiles", "sum_tiles", "chain_splats",
        "integrate_rays", "trace_rays", "collect_rays", "look_back",
    }  # fmt: skip
    assert {row["channels"] for row in mine if row["kernel"] == "moments"} == {1, 2, 3, 4}
    assert {row["channels"] for row in mine if row["kernel"] == "draw_tiles"} == {3, 4}
    for row in mine:
        assert row["spill_bytes"] == row["stack_bytes"] == 0, row
        assert row["registers"] <= registers.MOST_REGISTERS, row
        assert row["shared_bytes"] <= 48 * 1024, row


def test_table_in_the_repository_is_of_these_kernels(rows):
    table = json.loads(registers.RESULT.read_text())
    assert table["kernels_with_spills"] == 0
    assert table["kernels"] == rows, "run benchmarks/kernels/registers.py and commit its result"


def test_spills_and_errors_are_noticed(monkeypatch):
    text = registers._module.source("planes").replace(
        "__launch_bounds__(128, 5)", "__launch_bounds__(128, 16)"
    )
    monkeypatch.setattr(registers._module, "source", lambda name: text)
    assert registers.resources("planes", 4, "sm_90")["moments"]["spill_bytes"] > 0
    with pytest.raises(RuntimeError, match="error"):
        registers.compile_text("this is no kernel", ["--gpu-architecture=sm_90"])
