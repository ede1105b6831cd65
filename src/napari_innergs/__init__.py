"""napari-innergs: dense volumes made of 3D Gaussians from slices or X-ray projections.

Everything public is loaded when it is first used: importing the package imports neither torch nor numba.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["SliceConfig"],
        "config_dual": ["DualConfig"],
        "config_projections": ["ProjectionConfig"],
        "data": ["SliceStack"],
        "fit.motion": ["estimate_thickness"],
        "geometry.camera": ["Camera"],
        "geometry.grid": ["Grid"],
        "geometry.slices": ["SlicePlane"],
        "geometry.xray": ["ConeBeam", "ParallelBeam", "XrayGeometry"],
        "io.cameras": ["read_cameras", "read_photographs"],
        "io.scans": ["geometry_from_dict", "read_scan"],
        "io.read": ["read_stack", "read_times"],
        "io.write": ["write_volume"],
        "model": ["GaussianModel"],
        "photographs": ["Photographs"],
        "scan": ["Scan"],
        "result": ["Reconstruction", "load"],
        "tasks.dual": ["estimate_dual", "fit_dual", "reconstruct_dual"],
        "tasks.projections": ["estimate_projections", "fit_projections", "reconstruct_projections"],
        "tasks.slices": ["estimate_slices", "fit_slices", "reconstruct_slices"],
    },
)
