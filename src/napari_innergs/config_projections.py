"""Settings of a reconstruction from X-ray projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ProjectionCombine = Literal["average", "tv", "gaussians"]
Start = Literal["tv", "fdk"]
Rays = Literal["voxels", "exact"]
Guided = Literal["auto", "always", "never"]
ProjectionPresetName = Literal["fast", "balanced", "best", "r2-paper"]

PROJECTION_PRESETS: tuple[ProjectionPresetName, ...] = get_args(ProjectionPresetName)


def _basic(default: Any, title: str, description: str, **limits: Any) -> Any:
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "basic"}, **limits
    )


def _advanced(default: Any, title: str, description: str, **limits: Any) -> Any:
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "advanced"}, **limits
    )


class ProjectionConfig(BaseModel):
    """Settings of a projections-to-volume reconstruction.

    Every field has a title and a description with its unit; the widgets' forms, the command line's help and the
    YAML files are made from them. Fields are grouped as ``basic`` or ``advanced``.

    Examples
    --------
    >>> ProjectionConfig.preset("fast").view_steps < ProjectionConfig.preset("best").view_steps
    True
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    combine: ProjectionCombine = _basic(
        "average",
        "Combination",
        "average: total variation guided by the Gaussians where the object has flat parts, else a mean of both, "
        "where noise hides their difference (cone beams; else total variation); tv, gaussians: one of them.",
    )
    uncertainty: bool = _basic(
        True,
        "Uncertainty",
        "Also return the half-width of the 90 % band of the error, in attenuation units.",
    )
    tv_weight: float | None = _basic(
        None,
        "TV weight",
        "Weight of the total variation, as a share of the mean attenuation; empty: found from views held out.",
        ge=0.0,
        le=1.0,
    )
    guided: Guided = _advanced(
        "auto",
        "Guided",
        "Finish with total variation that counts less where the Gaussians have borders; auto: for objects with flat "
        "parts. Others would become patches.",
    )
    margin: int = _advanced(
        0,
        "Margin",
        "Voxels added on each side while computing, for objects that go on outside the grid.",
        ge=0,
        le=256,
    )
    tv_passes: int = _advanced(
        40, "TV passes", "Limit of the passes over all views of the total variation.", ge=1, le=1000
    )
    start: Start = _advanced(
        "tv",
        "Start",
        "The volume from which the Gaussians start: total variation or filtered backprojection.",
    )
    gaussians: bool = _advanced(True, "Gaussians", "Fit a model of Gaussians.")
    voxels_per_gaussian: float = _advanced(
        5.0, "Voxels per Gaussian", "Occupied voxels for each Gaussian.", ge=1.0, le=1000.0
    )
    max_gaussians: int = _advanced(
        500_000, "Most Gaussians", "Limit of the number of Gaussians.", ge=1, le=5_000_000
    )
    volume_steps: int = _advanced(
        120,
        "Volume steps",
        "Adam steps of the fit to the start, before projections are looked at.",
        ge=0,
        le=5000,
    )
    rays: Rays = _advanced(
        "voxels",
        "Rays",
        "voxels: the Gaussians' voxels are projected, a few views at a time; exact: line integrals of the Gaussians "
        "themselves, one view at a time.",
    )
    view_steps: int = _advanced(40, "View steps", "Adam steps on projections.", ge=0, le=100_000)
    rate: float = _advanced(2.0, "Rate", "Factor on the rates of the view steps.", gt=0.0, le=100.0)
    variation: float = _advanced(
        0.0,
        "Variation",
        "Weight of the total variation of the Gaussians' volume in the view steps (exact rays, every fifth).",
        ge=0.0,
        le=100.0,
    )
    structural_loss: float = _advanced(
        0.0,
        "D-SSIM share",
        "Share of D-SSIM in the loss of the view steps (exact rays), the rest being L1; 0 means a squared loss.",
        ge=0.0,
        le=1.0,
    )

    @classmethod
    def preset(cls, name: str) -> ProjectionConfig:
        """Return the settings of a named preset.

        Parameters
        ----------
        name : {"fast", "balanced", "best", "r2-paper"}
            The preset.

        Raises
        ------
        ValueError
            If there is no preset of that name.
        """
        if name not in _PRESETS:
            raise ValueError(f"config: there is no preset {name!r}; use one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    @classmethod
    def coerce(cls, config: ProjectionConfig | str | dict[str, Any] | None) -> ProjectionConfig:
        """Turn a preset name, a mapping, None or settings into settings.

        Raises
        ------
        ValueError
            If a field is unknown or out of range; the message names the field.
        """
        if config is None:
            return cls.preset("balanced")
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            return cls.preset(config)
        if not isinstance(config, dict):
            raise TypeError(
                f"config: expected settings, a preset name or a mapping, got {type(config).__name__}"
            )
        settings = dict(config)
        base = str(settings.pop("preset", "balanced"))
        if base not in _PRESETS:
            raise ValueError(f"config: there is no preset {base!r}; use one of {', '.join(_PRESETS)}")
        try:
            return cls(**{**_PRESETS[base], **settings})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise ValueError(f"config: there is no setting {name!r}; use one of {known}") from None
            raise ValueError(f"config: {name} = {first.get('input')!r}: {first['msg']}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> ProjectionConfig:
        """Read settings from a YAML file (`preset` may name the base)."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is not YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(content, dict):
            raise ValueError(f"config: {path} holds {type(content).__name__}, expected a mapping of settings")
        return cls.coerce(content)

    def to_yaml(self, path: str | Path) -> None:
        """Write the settings to a YAML file that `from_yaml` reads."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"voxels_per_gaussian": 8.0, "volume_steps": 50, "view_steps": 20},
    "balanced": {},
    "best": {"voxels_per_gaussian": 4.0, "volume_steps": 160, "view_steps": 60},
    "r2-paper": {
        "combine": "gaussians",
        "start": "fdk",
        "max_gaussians": 50_000,
        "volume_steps": 0,
        "rays": "exact",
        "view_steps": 3000,
        "rate": 10.0,
        "structural_loss": 0.25,
        "variation": 0.05,
        "uncertainty": False,
    },
}
