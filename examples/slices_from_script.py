"""Reconstruct a dense volume from sparse slices, and look at what the result says about itself.

    python examples/slices_from_script.py [--preset fast]

Uses the T1 brain that is shipped with the package: every 4th slice is given, the others are the truth.
"""

import argparse

import numpy as np

import napari_innergs as igs
from napari_innergs import samples

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--preset", default="balanced")
preset = parser.parse_args().preset

# Any (n, h, w) array and its affine make a stack; igs.read_stack reads one from a file.
sample = samples.volume("brain")
every_slice = igs.SliceStack(sample.data[:61], sample.affine, units=sample.unit, name=sample.title)
stack = every_slice.keep_every(4)
print(stack)

cost = igs.estimate_slices(stack, config=preset)
print(f"about {cost['seconds']:.0f} s and {cost['bytes'] / 2**20:.0f} MiB")

result = igs.reconstruct_slices(stack, config=preset)

# What the stack itself says: every second slice was left out, predicted and compared.
report = result.report
print(
    f"left-out slices: {report['psnr_heldout']:.2f} dB; "
    f"{report['baseline']} alone {report['baseline_psnr_heldout']:.2f} dB"
)
for name, share in report["contributions"].items():
    print(f"  {name:32} mean weight {share:.2f}")

# What the truth says, which a user does not have.
unseen = np.arange(61) % 4 != 0
truth = every_slice.data[unseen, ..., 0].astype(float)
error = result.volume[unseen] - truth
psnr = 20 * np.log10(np.ptp(truth) / np.sqrt(np.mean(error**2)))
inside = np.mean(np.abs(error) <= result.uncertainty[unseen])
print(f"slices never seen: {psnr:.2f} dB; the 90 % band holds {100 * inside:.0f} % of the errors")

# An image on any plane, the volume in the type of the input, and everything in a folder.
plane = igs.SlicePlane.through(result.grid, normal=(1, 1, 0))
print("oblique plane:", result.render_slice(plane).shape)
igs.write_volume("brain.tif", stack.restore(result.volume), result.grid)
result.save("brain")
print("written: brain.tif and brain/")
