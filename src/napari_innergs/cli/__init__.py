"""The command line: ``innergs slices | projections | dual | voxelise | demo | bench | info``.

Exit status: 0; 2 for bad input, with one line on the standard error; 130 when interrupted, after the best state
so far has been saved. Heavy modules are imported by the command that needs them: ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from napari_innergs.cli import bench, demo, dual, info, projections, slices, voxelise
from napari_innergs.cli._run import BAD_INPUT, Interrupted, complain, sentence

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
for _command in (
    slices.slices,
    projections.projections,
    dual.dual,
    voxelise.voxelise,
    demo.demo,
    bench.bench,
    info.info,
):
    app.command()(_command)

# the same classes whether typer brings its own click or uses the package
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


@app.callback()
def _callback() -> None:
    """Dense volumes from image slices, X-ray projections, or photographs with X-rays. Not for diagnosis."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0, 1 (a defect of the program, with a traceback), 2 (bad input) or 130 (interrupted).

    Examples
    --------
    >>> main(["voxelise", "nothing.ply", "--spacing", "1", "--output", "x.tif"])
    2
    """
    if not os.environ.get("INNERGS_DEBUG"):
        # libraries warn about files in several lines; what matters is an error of ours
        warnings.simplefilter("ignore")
    try:
        status = app(args=arguments, prog_name="innergs", standalone_mode=False)
    except _USAGE_ERROR as error:
        complain(error.format_message())
        return 2
    except Interrupted:
        return 130
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BAD_INPUT as error:
        if os.environ.get("INNERGS_DEBUG"):
            raise
        complain(sentence(error))
        return 2
    if status == 130:
        # some versions of typer turn the interruption into this status themselves
        complain("interrupted; there was nothing to save yet")
    return status if isinstance(status, int) else 0


def run() -> None:
    """Run a command and leave the process: what ``innergs`` starts."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:
        # threads of the engine finish what they are at before Python ends, which may take long
        os._exit(status)
    sys.exit(status)
