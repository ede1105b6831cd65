"""Pure geometry: frames, grids and slice planes; no pixels."""
