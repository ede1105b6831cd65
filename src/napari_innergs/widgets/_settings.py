"""What the user has set for this plugin in napari's preferences; defaults where there are none."""

from __future__ import annotations

from typing import Any

from napari_innergs.config import PRESETS


def _setting(section: str, name: str, default: Any) -> Any:
    try:
        # napari >= 0.9
        from napari.settings import get_plugin_settings

        return getattr(getattr(get_plugin_settings("napari-innergs"), section), name)
    except Exception:
        # an older napari, or a preferences file that can't be read: never a reason not to open a widget
        return default


def default_preset() -> str:
    """Return the preset with which forms open."""
    preset = _setting("slices", "preset", "balanced")
    return preset if preset in PRESETS else "balanced"
