#!/usr/bin/env bash
# imageio 2.38.1: volread of a DICOM folder stores Hounsfield units in 8 bits and wraps them.
#
# Input: a CT series of a skull-stripped head: the first slice holds only 0, later ones brain of 30
#        to 70 and calcification of 200 and 1000 HU. The files are ordinary 16-bit CT.
# Guess: int16, as stored, or float.
# Seen:  int8: the smallest type that holds the FIRST slice. 200 comes out as -56 and 1000 as -24.
#        No message. The same head with one voxel of air in its first slice gives int16, right.
# Why:   stripped or masked heads are what is shared of CT cohorts; bleeding keeps its value and
#        bone, clips and calcification become water.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet imageio==2.38.1 pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
from pathlib import Path

import imageio.v2 as imageio
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


hu = np.zeros((10, 32, 32), int)
hu[2:8, 8:24, 8:24], hu[4, 10, 10], hu[5, 12, 12], hu[5, 20, 20] = 30, 70, 200, 1000
with_air = hu.copy()
with_air[0, 0, 0] = -1000
for name, truth in (("stripped", hu), ("with_air", with_air)):
    write_ct(Path(name), truth, [(-16, -16, 4 * i) for i in range(10)])
    volume = imageio.volread(name, format="DICOM")
    seen = [int(volume[p]) for p in ((4, 10, 10), (5, 12, 12), (5, 20, 20))]
    print(f"{name:9} {volume.dtype}: 70, 200, 1000 HU read as {seen}")
    if name == "stripped":
        assert volume.dtype == np.int8 and seen == [70, -56, -24]
    else:
        assert volume.dtype == np.int16 and seen == [70, 200, 1000]
PY
