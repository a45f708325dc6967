#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): a sheared image survives NRRD and MetaImage and is rotated by NIfTI.
#
# Input: an image whose direction is that of a head CT with 20 degrees of gantry tilt (not
#        orthogonal), which SetDirection takes.
# Guess: WriteImage refuses it for NIfTI, or writes the shear into the sform, which can hold it.
# Seen:  NIfTI is written with another direction, the nearest rotation: the last slice lies 7 mm
#        off. A warning goes to the error stream, the call succeeds. NRRD and MetaImage keep the
#        shear.
# Why:   torchio and others save through this call. A tilted head that was read rightly is wrong
#        after one load and save, in one format of three.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet SimpleITK==2.5.7 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import SimpleITK as sitk

image = sitk.GetImageFromArray(np.zeros((12, 16, 20), np.int16))
image.SetSpacing((1, 1, 4))
cos, sin = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
image.SetDirection((1, 0, 0, 0, cos, 0, 0, sin, 1))
corner = (0, 15, 11)
true = np.array(image.TransformIndexToPhysicalPoint(corner))
for suffix in ("nrrd", "mha", "nii", "nii.gz"):
    sitk.WriteImage(image, f"head.{suffix}")
    again = sitk.ReadImage(f"head.{suffix}")
    off = np.linalg.norm(np.array(again.TransformIndexToPhysicalPoint(corner)) - true)
    print(
        f"{suffix:7} corner off by {off:.2f} mm, direction {np.round(again.GetDirection(), 3)[4:]}"
    )
    assert (off > 5) if "nii" in suffix else (off < 1e-4)
PY
