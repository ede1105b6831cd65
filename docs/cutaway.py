"""Make docs/images/dual_cutaway.png: an object whole and cut open, from a result of photographs and X-rays.

From the tooth of the benchmarks:

    innergs dual tooth/xray_50.json tooth/transforms_train.json --output out --format npz
    python docs/cutaway.py out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import napari_innergs as igs
from napari_innergs.geometry.camera import Camera

TARGET = Path(__file__).parent / "images" / "dual_cutaway.png"
# Pixels of a picture's sides, how many are rendered for each, and the colour behind.
SIZE, FINE, BEHIND = (440, 340), 2, 1.0
# The object's radius is the picture's half height over this.
MARGIN = 1.06


def main() -> None:
    """Render the two pictures side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", help="folder of a result")
    parser.add_argument("--azimuth", type=float, default=30.0, help="degrees round the object's z axis")
    parser.add_argument("--elevation", type=float, default=20.0, help="degrees above the plane of y and x")
    parser.add_argument("--cut", type=float, default=80.0, help="azimuth of the cut's normal, degrees")
    given = parser.parse_args()
    result = igs.load(given.result)
    solid = result.splats.means[result.splats.opacities > 0.5]
    centre = 0.5 * (solid.min(0) + solid.max(0))
    radius = float(np.linalg.norm(solid - centre, axis=1).max())

    def direction(azimuth: float, elevation: float) -> np.ndarray:
        a, e = np.radians([azimuth, elevation])
        return np.array([np.sin(e), np.cos(e) * np.sin(a), np.cos(e) * np.cos(a)])

    rows, columns = (FINE * n for n in SIZE)
    away = 5.0
    focal = 0.5 * rows * away / MARGIN
    lens = [[focal, 0, 0.5 * (columns - 1)], [0, focal, 0.5 * (rows - 1)], [0, 0, 1]]
    eye = centre + away * radius * direction(given.azimuth, given.elevation)
    camera = Camera.looking_at(eye, centre, lens, (rows, columns), up=(1.0, 0.0, 0.0))
    whole = result.render_rgb(camera, BEHIND)
    bright = float(np.percentile(result.volume, 99.9))
    cut = result.render_cutaway(
        camera, centre, direction(given.cut, 0.0), window=(0.0, bright), background=BEHIND
    )
    picture = np.concatenate([whole, cut], axis=1)
    picture = picture.reshape(SIZE[0], FINE, 2 * SIZE[1], FINE, 3).mean((1, 3))
    Image.fromarray(np.rint(255 * picture.clip(0, 1)).astype(np.uint8)).save(TARGET, optimize=True)
    print(TARGET, TARGET.stat().st_size // 1024, "KiB")


if __name__ == "__main__":
    main()
