"""Every kernel once, in both modes, on the GPU: what compute-sanitizer is run on.

compute-sanitizer --tool memcheck python tests/cuda_host/on_gpu.py
"""

from __future__ import annotations

import numpy as np
import torch

from napari_innergs import device
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam
from napari_innergs.operators.project import VoxelProjector, backproject
from napari_innergs.operators.rgb import render_rgb
from napari_innergs.operators.shear import Adam, sheared_gaussians
from napari_innergs.operators.slices import render_slices
from napari_innergs.operators.voxels import voxelise
from napari_innergs.operators.xray import render_xray


def main() -> None:
    where = torch.device(device.describe_device("cuda").name)
    g = torch.Generator().manual_seed(0)
    for deterministic in (False, True):
        device.set_deterministic(deterministic)
        for channels in (0, 1, 2, 5):
            shapes = [(301, 2), (301,), (301, 3), (301, channels), (301,)]
            inputs = [(0.4 * torch.randn(s, generator=g)).to(where).requires_grad_() for s in shapes]
            means = (torch.rand(301, 3, generator=g) * 40 - 3).to(where).requires_grad_()
            covs, sums = sheared_gaussians(*inputs)
            out = render_slices(means, covs, sums, [2.0, 9.5, 30.0], (33, 47))
            volume = voxelise(means, covs, sums, (20, 17, 35))
            view = torch.tensor([[10.0, -90, 15, -30, 80, -40, 0, 0, 2, 2, 0, 0]]).to(where).requires_grad_()
            image = render_xray(means, covs, sums, view, (41, 50))
            pose = torch.tensor([[0.0, 0, 1, -20], [0, 1, 0, -20], [1, 0, 0, 80], [0, 0, 0, 1]]).to(where)
            lens = torch.tensor([[70.0, 0, 24], [0, 70, 20], [0, 0, 1]]).to(where)
            photograph = render_rgb(
                means, covs, inputs[1].sigmoid(), inputs[2], pose, lens, (41, 50), depth=channels > 1
            )
            (out.square().sum() + volume.sum() + image.sum() + photograph[0].sum()).backward()
            Adam().step({"mean": means, "shear": inputs[0]}, {"mean": 0.1, "shear": 0.1})
    for geometry in (
        ConeBeam.circular(
            [0.2, 1.4, 2.9], source_origin=30.0, source_detector=45.0, detector_shape=(21, 35), pixel_size=1.5
        ),
        ParallelBeam.circular([0.2, 1.4], detector_shape=(21, 35)),
    ):
        grid = Grid((17, 20, 33), np.array([[1, 0, 0, -8], [0, 1, 0, -10], [0, 0, 1, -16], [0, 0, 0, 1.0]]))
        scan = VoxelProjector(geometry, grid, "cuda")
        scan.adjoint(scan.apply(np.ones(grid.shape, np.float32)))
        matrices = np.tile([[0, 0, 1, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]], (geometry.n_views, 1, 1))
        backproject(
            np.ones(scan.range_shape), matrices, np.ones(geometry.n_views), grid.shape, True, backend="cuda"
        )
    torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
