"""``python -m napari_innergs.cli``: the same as ``innergs``."""

from napari_innergs.cli import run

if __name__ == "__main__":
    run()
