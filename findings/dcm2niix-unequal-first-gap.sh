#!/usr/bin/env bash
# dcm2niix 1.0.20260724: one gap, the first, for every slice of an unequally spaced head.
#
# Input: 5 mm slices through the skull base, 8 mm above it, and the same from head to feet; HU = 2
#        z.
# Guess: the plain file has the mean gap, and ct_Eq_1.nii is sampled at the smallest gap.
# Seen:  the plain file has the first gap along z, so the extent depends on where the 5 mm part
#        lies: 90 mm in one order, 144 in the other, of 114. ct_Eq_1.nii is right. Exit status 0.
# Why:   old head protocols are unequally spaced; the plain file's head is a quarter too low or too
#        high, and its header says nothing of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet dcm2niix==1.0.20260724 pydicom==3.0.2 nibabel==5.4.2 numpy==2.4.6
venv/bin/python - <<'PY'
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_ct(folder, hu, places, tags=lambda i: {}, tilt=0.0, name="s"):
    """Slices (z, y, x) in HU, at their positions in mm, to one CT series of single files."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    for i, (plane, place) in enumerate(zip(hu, places, strict=True)):
        d = Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, generate_uid()
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.Modality, d.Manufacturer, d.SeriesDescription = "CT", "ACME", "HEAD"
        d.ImageType, d.PatientPosition, d.KVP = ["ORIGINAL", "PRIMARY", "AXIAL"], "HFS", "120"
        d.StudyID, d.SeriesNumber, d.AcquisitionNumber, d.InstanceNumber = "1", 2, 1, i + 1
        d.PatientID, d.PatientName = "P1", "Head^One"
        d.PatientBirthDate = d.PatientSex = d.AccessionNumber = d.ReferringPhysicianName = ""
        d.StudyDate = d.SeriesDate = d.AcquisitionDate = d.ContentDate = "20200102"
        d.StudyTime = d.SeriesTime = d.AcquisitionTime = d.ContentTime = "101112"
        d.SliceThickness, d.GantryDetectorTilt, d.PositionReferenceIndicator = "4", str(tilt), ""
        d.ImageOrientationPatient = ["1", "0", "0", "0", f"{cos:.10f}", f"{-sin:.10f}"]
        d.ImagePositionPatient = [f"{v:.6f}" for v in place]
        d.PixelSpacing, (d.Rows, d.Columns) = [1, 1], plane.shape
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleIntercept, d.RescaleSlope, d.RescaleType = "0", "1", "HU"
        d.PixelData = plane.astype("<i2").tobytes()
        for keyword, value in tags(i).items():
            setattr(d, keyword, value)
        d.save_as(folder / f"{name}{i:02d}.dcm", enforce_file_format=True)


def convert(folder, *options):
    """Every NIfTI file that dcm2niix writes for a folder, by name."""
    out = folder.with_name(folder.name + "_out")
    out.mkdir()
    command = ["venv/bin/dcm2niix", *options, "-z", "n", "-b", "n", "-f", "ct", "-o", out, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {p.name: nib.load(p) for p in sorted(out.glob("*.nii"))}, done.stdout


fine_first = np.cumsum([0] + [5] * 10 + [8] * 8)
coarse_first = np.cumsum([0] + [8] * 8 + [5] * 10)
for name, z in (("fine_first", fine_first), ("coarse_first", coarse_first)):
    hu = np.broadcast_to(2 * z[:, None, None], (len(z), 32, 32))
    write_ct(Path(name), hu, [(-16, -16, v) for v in z])
    images, log = convert(Path(name))
    assert list(images) == ["ct.nii", "ct_Eq_1.nii"], list(images)
    for file, image in images.items():
        step, slices = image.affine[2, 2], image.shape[2]
        seen = np.asarray(image.dataobj)[16, 16].astype(float)
        off = np.abs(seen - 2 * (image.affine[2, 3] + step * np.arange(slices))).max()
        extent = step * (slices - 1)
        print(
            f"{name:13}{file:12} {slices} slices, step {step:.2f}, extent {extent:5.1f} of 114 mm, HU off {off:.1f}"
        )
        if file == "ct.nii":
            assert np.isclose(step, z[1] - z[0]) and slices == len(z)
        else:
            assert off <= 1 and abs(extent - 114) < 5
PY
