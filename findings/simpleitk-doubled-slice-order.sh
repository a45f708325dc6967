#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): one doubled slice makes it forget all positions.
#
# Input: 36 slices 4 mm apart, without and with a second image of the fifteenth; images numbered
#        from feet to head, or in two passes (every other place, then the rest).
# Guess: slices are sorted by position; the spacing of most gaps, 4 mm, or the mean, 3.9 mm.
# Seen:  without the repeat, right. With it GDCM sorts every image by InstanceNumber instead, and
#        the spacing is the distance of the first and last image of that list divided by 36.
#        Numbered from the feet: 1.56 mm, a head of 5 cm, the repeat on top. In two passes: the
#        slices themselves are interleaved wrongly. The only sign is a warning of uneven sampling.
# Why:   repeated exposures are common in head CT, and most ITK readers go through this call.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet SimpleITK==2.5.7 pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
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


z = np.array([*range(0, 144, 4), 56])
numberings = {
    "from the feet": np.arange(37) + 1,
    "in two passes": np.arange(37) // 2 + 1 + 19 * (np.arange(37) % 2),
}
numberings["in two passes"][36] = 38
for name, number in numberings.items():
    for count in (36, 37):
        folder = Path(f"{name} {count}")
        hu = np.broadcast_to(z[:count, None, None], (count, 16, 16))
        write_ct(
            folder,
            hu,
            [(-8, -8, v) for v in z[:count]],
            tags=lambda i: {"InstanceNumber": int(number[i])},
        )
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        image = sitk.ReadImage(files)
        seen = sitk.GetArrayViewFromImage(image)[:, 0, 0]
        spacing = image.GetSpacing()[2]
        print(
            f"{name}, {count} images: spacing {spacing:.3f} mm, slices show z = {seen[:4]} ... {seen[-3:]}"
        )
        if count == 36:
            assert np.array_equal(seen, z[:36]) and np.isclose(spacing, 4)
        else:
            assert np.array_equal(seen, z[np.argsort(number)])
            assert np.isclose(spacing, abs(seen[-1] - seen[0]) / 36, atol=1e-3)
PY
