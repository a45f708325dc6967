#!/usr/bin/env bash
# MONAI 1.6.1: with itk installed, LoadImage drops the slices whose thickness is not the first
# one's.
#
# Input: one CT series (one SeriesInstanceUID, 4 mm from slice to slice): 5 mm thick through the
#        skull base and 10 mm above, as head protocols are; and 2.5 mm, then 5 mm.
# Guess: 12 slices, whatever reader takes the folder.
# Seen:  ITKReader splits a series by SliceThickness (and SeriesDate) and reads the part whose
#        thickness comes first as TEXT: "10" before "5", "2.5" before "5". LoadImage takes
#        ITKReader where itk is installed, else PydicomReader, which reads all 12. A warning speaks
#        of several series.
# Why:   the same code loses the skull base or the cerebrum, by thickness, and only on machines
#        that happen to have itk. On a tilted head the two readers also give different affines.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.15.0 monai==1.6.1 itk-io==5.4.7 pydicom==3.0.2 nibabel==5.4.2
venv/bin/python - <<'PY'
import warnings
from pathlib import Path

import numpy as np
from monai.transforms import LoadImage
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


z = 4 * np.arange(12)
hu = np.broadcast_to(z[:, None, None], (12, 16, 16))
warnings.simplefilter("ignore")
for low, high, kept in (("5", "10", z[5:]), ("2.5", "5", z[:5])):
    folder = Path(f"{low}_{high}")
    write_ct(
        folder,
        hu,
        [(-8, -8, v) for v in z],
        tags=lambda i: {"SliceThickness": low if i < 5 else high},
    )
    slices = {}
    for reader in (None, "ITKReader", "PydicomReader"):
        volume = LoadImage(reader=reader)(str(folder))
        slices[reader] = sorted(volume[8, 8].int().tolist())
        print(
            f"{low} mm, then {high} mm, {reader or 'default':14} {len(slices[reader]):2} slices, z = {slices[reader]}"
        )
    assert slices[None] == slices["ITKReader"] == kept.tolist()
    assert slices["PydicomReader"] == z.tolist()

write_ct(Path("tilted"), hu, [(-8, -8, v) for v in z], tilt=20)
itk, pydicom = (LoadImage(reader=r)("tilted").affine[:3, 2] for r in ("ITKReader", "PydicomReader"))
print(
    "step of a slice, 20 degrees of tilt: ITKReader",
    itk.numpy().round(2),
    "PydicomReader",
    pydicom.numpy().round(2),
)
assert np.allclose(pydicom, [0, 0, 4], atol=1e-3) and abs(itk[1]) > 1
PY
