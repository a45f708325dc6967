#!/usr/bin/env bash
# antspyx 0.6.3: ants.dicom_read stacks slices in the order of the folder and calls them 1 mm
# apart.
#
# Input: a CT series of 12 slices 4 mm apart; HU = 10 times the slice's number, names in another
#        order.
# Guess: as ITK's series reader: sorted by position, 4 mm.
# Seen:  the order is that of os.listdir, so another copy of the folder can give another head, and
#        the spacing along z is 1 mm (that of a single image). No message.
# Why:   a head with its slices shuffled and a quarter of its height still looks like a tensor of
#        the right shape. Read DICOM by another tool and hand ANTs a NIfTI.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet antspyx==0.6.3 pydicom==3.0.2
venv/bin/python - <<'PY'
import os
from pathlib import Path

import ants
import numpy as np
from pydicom import dcmread
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


folder = Path("series")
n = 12
hu = np.broadcast_to(10 * np.arange(n)[:, None, None], (n, 16, 16))
order = [5, 0, 9, 2, 11, 7, 1, 10, 3, 8, 4, 6]
write_ct(folder, hu[order], [(-8, -8, 4 * i) for i in order])
image = ants.dicom_read(str(folder))
seen = image.numpy()[8, 8].astype(int)
listed = [
    int(dcmread(folder / name).ImagePositionPatient[2] / 4 * 10) for name in os.listdir(folder)
]
print("slices by position", (10 * np.arange(n)).tolist())
print("ants.dicom_read   ", seen.tolist(), "spacing", image.spacing)
print("os.listdir        ", listed)
assert seen.tolist() == listed and image.spacing == (1.0, 1.0, 1.0)
PY
