#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): one doubled slice can shrink a head to a third of its height.
#
# Input: 37 images, 36 places 4 mm apart and one of them twice; names that give no order.
# Guess: the spacing is that of most gaps, 4 mm, or the mean, 3.9 mm.
# Seen:  the spacing is the distance of the first and last FILE of the list divided by 36. GDCM's
#        sorting puts the repeated image last, so that the head gets 4 mm * 14 / 36 = 1.56 mm. The only
#        sign is a warning on the error stream about uneven sampling, which says nothing of it.
# Why:   repeated exposures are common in head CT; every ITK reader (3D Slicer's plain reader, MONAI's
#        ITKReader, nnU-Net, TotalSegmentator) goes this way.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet SimpleITK==2.5.7 pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
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
        d.PatientID = d.PatientName = "P1"
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
z = [*range(0, 144, 4), 56]
hu = np.broadcast_to(np.array(z)[:, None, None], (37, 16, 16))
for repeat in (False, True):
    folder = Path(f"repeat_{repeat}")
    count = 37 if repeat else 36
    write_ct(folder, hu[:count], [(-8, -8, v) for v in z[:count]])
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(files)
    slices = sitk.GetArrayViewFromImage(image)[:, 0, 0]
    print(f"{count} images: spacing {image.GetSpacing()[2]:.3f} mm, last slices in file order show z = {slices[-3:]}")
    expected = 4 * 14 / 36 if repeat else 4
    assert np.isclose(image.GetSpacing()[2], expected, atol=1e-3)
    assert slices[-1] == (56 if repeat else 140)
PY
