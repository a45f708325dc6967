#!/usr/bin/env bash
# nibabel 5.4.2, SimpleITK 2.5.7, antspyx 0.6.3: the sform's CODE decides who agrees with whom.
#
# Input: valid NIfTI files whose sform and qform are both set and differ by a rotation of 20
#        degrees (an image registered by its sform), with sform code 1 (scanner), 2 (aligned) or 4
#        (MNI).
# Guess: nibabel follows the sform, ITK the qform or the sform, the same for every code.
# Seen:  with code 1 all agree on the sform. With code 2 or 4 SimpleITK and ants.image_read follow
#        the qform; nibabel does not, and neither does ants.from_nibabel_nifti: two functions of
#        one package put the same file in two places. No message.
# Why:   registration tools write code 2 or 4. A head aligned for training is aligned for readers
#        by nibabel (MONAI, nilearn) and is not for readers by ITK (nnU-Net, torchio, ANTs).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet antspyx==0.6.3 SimpleITK==2.5.7 nibabel==5.4.2
venv/bin/python - <<'PY'
import ants
import nibabel as nib
import numpy as np
import SimpleITK as sitk

voxel = np.array([2, 3, 4])
to_ras = np.array([-1, -1, 1])
qform = np.diag([1, 1, 4, 1.0])
qform[:3, 3] = -5, -6, -20
cos, sin = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
sform = np.eye(4)
sform[1:3, 1:3] = [[cos, -sin], [sin, cos]]
sform = sform @ qform


def ants_point(image):
    return to_ras * (np.array(image.origin) + image.direction @ (np.array(image.spacing) * voxel))


for code in (1, 2, 4):
    image = nib.Nifti1Image(np.zeros((10, 12, 14), np.int16), sform)
    image.set_qform(qform, 1)
    image.set_sform(sform, code)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, "head.nii")
    itk = sitk.ReadImage("head.nii").TransformIndexToPhysicalPoint(voxel.tolist())
    points = {
        "nibabel": nib.load("head.nii").affine[:3] @ [*voxel, 1],
        "SimpleITK": to_ras * itk,
        "ants.image_read": ants_point(ants.image_read("head.nii")),
        "ants.from_nibabel_nifti": ants_point(ants.from_nibabel_nifti(nib.load("head.nii"))),
    }
    for reader, point in points.items():
        follows = [
            f
            for f, a in (("sform", sform), ("qform", qform))
            if np.allclose(a[:3] @ [*voxel, 1], point, atol=1e-3)
        ]
        print(f"sform code {code}: {reader:24} {np.round(point, 2)} {follows[0]}")
        itk_like = reader in ("SimpleITK", "ants.image_read")
        assert follows == ["qform" if itk_like and code != 1 else "sform"]
PY
