"""Sample data for napari's File menu."""
