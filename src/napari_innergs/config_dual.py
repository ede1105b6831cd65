"""Settings of a reconstruction from photographs and X-rays of one object."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from napari_innergs._settings import Settings, advanced, basic

DualPresetName = Literal["fast", "balanced", "best"]
Reference = Literal["fdk", "tv"]

DUAL_PRESETS: tuple[DualPresetName, ...] = get_args(DualPresetName)


class DualConfig(Settings):
    """Settings of a reconstruction from photographs and X-rays.

    Every field has a title and a description with its unit; the widgets' forms, the command line's help and the
    YAML files are made from them. Fields are grouped as ``basic`` or ``advanced``.

    Examples
    --------
    >>> DualConfig.preset("fast").photo_steps < DualConfig.preset("best").photo_steps
    True
    """

    xray: Literal["fast", "balanced", "best"] = basic(
        "balanced", "X-ray preset", "Preset of the reconstruction of the attenuation."
    )
    photo_steps: int = basic(
        1200, "Photo steps", "Steps of the fit to the photographs, one photograph each.", ge=1, le=200_000
    )
    joint_steps: int = basic(
        300,
        "Joint steps",
        "Steps in which photographs and X-rays are fitted together, one photograph and one view each.",
        ge=0,
        le=200_000,
    )
    hull: bool = basic(
        True,
        "Outline in the X-rays",
        "With fewer than 20 views: no attenuation where the masks see no object.",
    )
    refine_cameras: bool = basic(
        False, "Refine cameras", "Also refine the cameras' places and directions in the joint steps."
    )
    silhouettes: bool = advanced(
        True, "Silhouettes", "Refine the alignment on the outlines in the photographs' masks."
    )
    candidate: int = advanced(
        0,
        "Candidate",
        "Which of several poses that cannot be told apart is taken, 0 being the best.",
        ge=0,
        le=1000,
    )
    harmonics: int = advanced(
        1,
        "Harmonics",
        "Degree of the spherical harmonics: 0 for colours that look alike from everywhere.",
        ge=0,
        le=3,
    )
    max_splats: int = advanced(
        20_000, "Most on the surface", "Limit of the number of Gaussians with colour.", ge=100, le=2_000_000
    )
    structural_loss: float = advanced(
        0.2, "D-SSIM share", "Share of D-SSIM in the loss of photographs, the rest being L1.", ge=0.0, le=1.0
    )
    joint_rate: float = advanced(
        1.0, "Joint rate", "Factor on the rates of the joint steps.", gt=0.0, le=100.0
    )
    pull: float = advanced(
        0.05,
        "Pull of the X-rays",
        "How strongly X-rays move Gaussians of the surface, as a share of the photographs' own pull.",
        ge=0.0,
        le=10.0,
    )
    reference_weight: float = advanced(
        1.0,
        "Reference weight",
        "Weight of a loss that compares sections of the Gaussians with a conventional reconstruction's; 0: none.",
        ge=0.0,
        le=100.0,
    )
    reference_views: float = advanced(
        0.0,
        "Weight of views between",
        "Weight of a loss that compares views between the measured ones with a conventional reconstruction's, where "
        "it can be trusted; 1 is the weight of a measured view. Needs projections.",
        ge=0.0,
        le=100.0,
    )
    zero_one: float = advanced(
        0.0,
        "Zero-one weight",
        "Weight of a loss in the joint steps that makes opacities 0 or 1.",
        ge=0.0,
        le=1.0,
    )
    reference: Reference = advanced(
        "tv",
        "Reference",
        "What sections and views between are compared with: filtered backprojection or total variation.",
    )
    shell: float = advanced(
        1.5, "Shell", "Half the thickness of the coloured shell, voxels.", gt=0.0, le=50.0
    )

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {
            "xray": "fast",
            "photo_steps": 500,
            "joint_steps": 100,
            "max_splats": 8000,
            "harmonics": 0,
        },
        "balanced": {},
        "best": {
            "xray": "best",
            "photo_steps": 3000,
            "joint_steps": 600,
            "max_splats": 40_000,
            "harmonics": 2,
        },
    }
