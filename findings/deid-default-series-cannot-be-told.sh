#!/usr/bin/env bash
# deid 0.4.13 with pydicom 3.0.2: the default recipe deletes what says which image belongs where.
#
# Input: two patients' CT heads in one folder, de-identified by replace_identifiers with the recipe
#        that deid takes if none is given.
# Guess: UIDs are replaced by new ones, one for one.
# Seen:  Study, Series, Frame of Reference, SOP Instance and even SOP Class UID are gone. SimpleITK
#        sees one series of both heads under an empty name; dicom2nifti writes nothing, no error;
#        dcm2niix writes one head, 10 slices, some of one patient and some of the other.
# Why:   what is left cannot be sorted into scans any more, and each tool fails in its own quiet
#        way.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet \
  deid==0.4.13 dcm2niix==1.0.20260724 dicom2nifti==2.6.2 SimpleITK==2.5.7 nibabel==5.4.2 \
  pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
import logging
import subprocess
from pathlib import Path

import dicom2nifti
import nibabel as nib
import numpy as np
import SimpleITK
from deid.dicom import get_identifiers, replace_identifiers
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


logging.disable(logging.INFO)
hu = np.zeros((10, 32, 32))
places = [(-16, -16, 4 * i) for i in range(10)]
write_ct(Path("given"), hu + 1, places, name="a")
write_ct(Path("given"), hu + 2, places, name="b", tags=lambda i: {"PatientID": "P2"})
files = [str(p) for p in sorted(Path("given").iterdir())]
for folder in ("clean", "by_dicom2nifti", "by_dcm2niix"):
    Path(folder).mkdir()
replace_identifiers(
    files, ids=get_identifiers(files), save=True, output_folder="clean", overwrite=True
)
before, after = dcmread(files[0]), dcmread(next(Path("clean").iterdir()))
gone = sorted(e.keyword for e in before if e.keyword.endswith("UID") and e.tag not in after)
series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs("clean")
heads = [len(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames("clean", s)) for s in series]
dicom2nifti.convert_directory("clean", "by_dicom2nifti")
subprocess.run(
    ["venv/bin/dcm2niix", "-z", "n", "-o", "by_dcm2niix", "clean"], check=True, capture_output=True
)
niix = [nib.load(p).get_fdata()[16, 16].astype(int) for p in Path("by_dcm2niix").glob("*.nii")]
print("gone:", gone)
print("SimpleITK:", series, "images", heads)
print(
    "dicom2nifti:",
    list(Path("by_dicom2nifti").iterdir()),
    " dcm2niix:",
    [f"{len(z)} slices of patients {set(z.tolist())}" for z in niix],
)
assert {"SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"} <= set(gone)
assert series == ("",) and heads == [20] and not list(Path("by_dicom2nifti").iterdir())
assert [len(z) for z in niix] == [10] and set(niix[0].tolist()) == {1, 2}
PY
