"""Settings: one source for widgets, the command line, YAML files and the report of a result."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import field_validator

from napari_innergs._settings import Settings, advanced, basic

Method = Literal["nearest", "linear", "cubic", "pchip", "flow-dis", "flow-tvl1"]
GaussianField = Literal["normalised", "additive"]
Motion = Literal["off", "stack", "slice"]
Combine = Literal["learned", "best", "average"]
PresetName = Literal["fast", "balanced", "best", "innergs-paper"]

METHODS: tuple[Method, ...] = get_args(Method)
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


class SliceConfig(Settings):
    """Settings of a slices-to-volume reconstruction.

    Every field has a title and a description with its unit; the widgets' forms, the command line's help and the
    YAML files are made from them. Fields are grouped as ``basic`` or ``advanced``.

    Examples
    --------
    >>> SliceConfig.preset("fast").iterations < SliceConfig.preset("best").iterations
    True
    """

    combine: Combine = basic(
        "learned",
        "Combination",
        "learned: weights that vary in space, learned from the stack itself; best: the one candidate that "
        "predicts left-out slices best; average: plain mean of all candidates.",
    )
    denoise: Literal["auto", "off"] = basic(
        "auto",
        "Noise",
        "auto: estimate the noise and denoise the slices (total variation) before interpolating when there is "
        "some; off: trust every pixel.",
    )
    uncertainty: bool = basic(
        True, "Uncertainty", "Also return the half-width of the 90 % band of the error, in intensity units."
    )
    motion: Motion = basic(
        "off",
        "Motion",
        "Several stacks: find the rigid motion of each stack (as a whole) or of each slice, together with "
        "the volume.",
    )
    match_intensity: bool = basic(
        True,
        "Match intensities",
        "Several stacks: bring their contrasts to that of the first by gain and offset.",
    )
    robust: bool = basic(
        True,
        "Robust",
        "With motion: trust pixels and slices less that no volume explains (artefacts, outliers).",
    )
    methods: tuple[Method, ...] = advanced(
        METHODS, "Conventional", "Conventional candidates to compute, compare and combine."
    )
    gaussians: tuple[GaussianField, ...] = advanced(
        ("normalised",), "Gaussian fields", "Gaussian candidates to fit; empty for none."
    )
    gaussian_spacing: float = advanced(
        2.0, "Spacing", "Distance between Gaussian centres within a slice, in pixels.", ge=1.0, le=16.0
    )
    through_sigma: float = advanced(
        0.7,
        "Through sigma",
        "Standard deviation of the Gaussians through the plane, in slice gaps.",
        ge=0.2,
        le=1.0,
    )
    volume_spacings: tuple[float, ...] = advanced(
        (2.0, 2.5, 3.2),
        "Volume spacings",
        "Thick slices: distances between Gaussian centres of the fields that are fitted, in voxels; a field each.",
    )
    iterations: int = advanced(40, "Iterations", "Adam steps of each Gaussian fit.", ge=0, le=5000)
    densify: bool = advanced(
        False,
        "Densify",
        "Add Gaussians where the observed slices are not explained, remove those without weight.",
    )
    shear_from_flow: bool = advanced(
        True, "Flow shear", "Start the Gaussians' shear from the optical flow between neighbouring slices."
    )

    structural_loss: float = advanced(
        0.0,
        "D-SSIM share",
        "Share of D-SSIM in the loss, the rest being L1; 0 means a squared loss.",
        ge=0.0,
        le=1.0,
    )

    @field_validator("methods", "gaussians")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # keep the first of each: twice the same candidate is no evidence
        return tuple(dict.fromkeys(value))

    @field_validator("volume_spacings")
    @classmethod
    def _spacings(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 1.2 <= spacing <= 16 for spacing in value):
            raise ValueError("each spacing must be from 1.2 to 16 voxels")
        return tuple(dict.fromkeys(value))

    @field_validator("denoise", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `off` as false
        return "off" if value is False else value

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {
            "methods": ("nearest", "linear", "cubic", "pchip", "flow-dis"),
            "gaussian_spacing": 2.5,
            "volume_spacings": (2.5,),
            "iterations": 15,
        },
        "balanced": {},
        "best": {
            "gaussians": ("normalised", "additive"),
            "volume_spacings": (1.7, 2.0, 2.5, 3.2),
            "iterations": 100,
        },
        "innergs-paper": {
            "methods": (),
            "gaussians": ("additive",),
            "combine": "best",
            "denoise": "off",
            "shear_from_flow": False,
            "densify": True,
            "structural_loss": 0.2,
            "iterations": 300,
            "uncertainty": False,
        },
    }
