"""napari layers to arrays with world geometry, and back."""
