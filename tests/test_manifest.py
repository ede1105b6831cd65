"""The npe2 manifest, and what opening napari with the plugin costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import napari_innergs

npe2 = pytest.importorskip("npe2")
MANIFEST = Path(napari_innergs.__file__).parent / "napari.yaml"
HEAVY = ("torch", "cupy", "numba", "dask", "pyqtgraph")


@pytest.fixture(scope="module")
def manifest():
    return npe2.PluginManifest.from_file(MANIFEST)


def test_manifest_is_valid_and_complete(manifest):
    manifest.validate_imports()
    assert manifest.name == "napari-innergs"
    widgets = [widget.display_name for widget in manifest.contributions.widgets]
    assert widgets == [
        "Slices to volume",
        "Projections to volume",
        "Photos + X-rays",
        "Compare volumes",
        "Gaussians to volume",
    ]
    assert len(manifest.contributions.sample_data) == 10


def test_every_command_imports(manifest):
    for command in manifest.contributions.commands:
        assert callable(npe2.manifest.utils.import_python_name(command.python_name))


def test_menus_exist_in_napari(manifest):
    from napari._app_model.constants import MenuId

    known = {str(menu) for menu in MenuId.contributables()}
    assert set(manifest.contributions.menus) <= known


def test_installed_package_offers_the_manifest():
    assert npe2.PluginManifest.from_distribution("napari-innergs").display_name == "InnerGS"


def test_root_link_is_the_packaged_manifest():
    link = Path(__file__).parents[1] / "napari.yaml"
    if not link.exists():
        pytest.skip("not a source checkout")
    assert link.read_text() == MANIFEST.read_text()


def test_preset_setting_matches_the_config(manifest):
    from napari_innergs.config import PRESETS

    preset = manifest.contributions.configurations["slices"].properties["preset"]
    assert tuple(preset.enum) == PRESETS


@pytest.mark.parametrize(
    "module",
    ["napari_innergs", "napari_innergs.samples"]
    + [f"napari_innergs.widgets.{name}" for name in ("slices", "projections", "dual", "compare", "voxelise")],
)
def test_modules_of_the_manifest_import_nothing_heavy(module):
    # napari itself imports dask and, where installed, numba: what counts is what we add
    code = (
        "import sys\n"
        + ("import napari.layers, napari.qt.threading\n" if "widgets" in module else "")
        + f"before = set(sys.modules)\nimport {module}\n"
        + f"print([name for name in {HEAVY!r} if name in sys.modules and name not in before])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


def test_samples_do_not_import_napari():
    code = "import sys, napari_innergs.samples\nprint('napari' in sys.modules or 'qtpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "False", found.stderr
