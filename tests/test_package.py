"""What installing and importing the package costs and brings."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import napari_innergs

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "cupy", "numba", "scipy", "skimage", "cv2", "dask", "napari", "qtpy", "pyqtgraph")


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import napari_innergs; print(time.perf_counter() - t)"
    # the least of a few: other processes may be running
    assert min(float(run_python(code)) for _ in range(4)) < 0.2


@pytest.mark.parametrize("module", ["napari_innergs", "napari_innergs.config", "napari_innergs.cli"])
def test_import_loads_nothing_heavy(module):
    code = f"import json, sys, {module}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert json.loads(run_python(code)) == []


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from napari_innergs.cli import main\n"
        "main(['--help']); main(['slices', '--help'])\n"
        f"print([m for m in {HEAVY} if m in sys.modules]); print(time.perf_counter() - t)"
    )
    ends = [run_python(code).splitlines()[-2:] for _ in range(3)]
    assert all(loaded == "[]" for loaded, _ in ends)
    assert min(float(seconds) for _, seconds in ends) < 1


def test_every_public_name_is_there():
    for name in napari_innergs.__all__:
        assert getattr(napari_innergs, name) is not None
    assert set(napari_innergs.__all__) <= set(dir(napari_innergs))
    with pytest.raises(AttributeError):
        napari_innergs.reconstruct_everything  # noqa: B018


def test_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == napari_innergs.__version__
    assert f"version: {napari_innergs.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_constraints_are_exact_and_cover_the_dependencies():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    wanted = [*project["dependencies"], *content["dependency-groups"]["test"]]
    wanted += [*content["dependency-groups"]["lint"], *project["optional-dependencies"]["medical"]]
    wanted += project["optional-dependencies"]["zarr"]
    names = {re.match(r"[A-Za-z0-9._-]+", one)[0].lower().replace("_", "-") for one in wanted}
    # types of PyYAML are stubs for mypy alone
    assert names - pinned <= {"types-pyyaml"}


def test_base_needs_no_qt_binding_and_no_gpu():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = " ".join(project["dependencies"]).lower()
    for name in ("pyqt5", "pyqt6", "pyside", "cupy", "napari[all]"):
        assert name not in base
    assert "Framework :: napari" in project["classifiers"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_everything(wheel):
    names = set(wheel.namelist())
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source))
        for path in (source / "napari_innergs").rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".npz", ".txt", ".md", ".cu", ".cuh", ".typed")
    }
    assert wanted <= names
    for name in ("napari.yaml", "py.typed", "samples/data/brain.npz", "samples/data/LICENSE.bone.txt"):
        assert f"napari_innergs/{name}" in names
    for name in ("planes.cu", "shear.cu", "xray.cu", "common.cuh"):
        assert f"napari_innergs/cuda/kernels/{name}" in names


def test_wheel_holds_nothing_else(wheel):
    for name in wheel.namelist():
        assert name.startswith(("napari_innergs/", "napari_innergs-"))
        assert "__pycache__" not in name
    assert sum(info.file_size for info in wheel.infolist()) < 4 * 2**20


def test_wheel_metadata(wheel):
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry).decode()
    assert "[napari.manifest]\nnapari-innergs = napari_innergs:napari.yaml" in text
    assert "innergs = napari_innergs.cli:run" in text
    licences = [name for name in wheel.namelist() if ".dist-info/licenses/" in name]
    for name in ("LICENSE", "LICENSE.brain.txt", "LICENSE.bone.txt", "LICENSE.cells.txt", "NOTICE.md"):
        assert any(one.endswith(name) for one in licences), name
