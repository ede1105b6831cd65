"""Examples in the documentation and in docstrings run; links lead somewhere."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
MODULES = (
    "config",
    "config_projections",
    "config_dual",
    "device",
    "samples._volumes",
    "tasks.projections",
    "tasks.dual",
    "fit.xray_reference",
    "tasks.scan_checks",
    "layers.xray",
    "baselines.xray_tv",
    "tasks.slices",
    "operators.acquisition",
    "baselines.tv",
    "operators.rgb",
    "operators.xray",
    "operators.slices",
    "operators.voxels",
    "cli",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(f"napari_innergs.{name}")).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_options_that_exist(page):
    from typer.main import get_command

    from napari_innergs.cli import app

    commands = get_command(app).commands
    for language, code in BLOCK.findall(page.read_text()):
        if language != "console":
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = line.removeprefix("$ ").split()
            if words[:1] != ["innergs"] or len(words) < 2 or words[1].startswith("-"):
                continue
            known = {name for option in commands[words[1]].params for name in option.opts} | {"--help"}
            assert {word for word in words if word.startswith("-") and len(word) > 1} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_script_in_examples_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slices_from_script.py", "--preset", "fast"])
    path = ROOT / "examples" / "slices_from_script.py"
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    assert (tmp_path / "brain" / "report.json").exists()
