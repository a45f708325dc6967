#!/usr/bin/env bash
# dicom2nifti 2.6.2: convert_directory writes two patients to one file name; the last one stays.
#
# Input: a folder with two patients, each with series number 2 called HEAD (as every scan of one
#        protocol is called).
# Guess: names that differ, or an error; two files in any case.
# Seen:  both are written to 2_head.nii.gz: one of two heads remains, no error and no warning. A
#        second series of other description in the same folder does get its own file.
# Why:   a cohort exported to one folder loses all heads of a protocol but one, and the one that is
#        kept carries no hint of whose it is. Convert one series a folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet dicom2nifti==2.6.2 pydicom==3.0.2 nibabel==5.4.2 numpy==2.4.6
venv/bin/python - <<'PY'
import logging
from pathlib import Path

import dicom2nifti
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


logging.disable(logging.INFO)
hu = np.zeros((10, 32, 32), int)
places = [(-16, -16, 4 * i) for i in range(10)]
for keyword, value, files in (("PatientID", "P2", 1), ("SeriesDescription", "HEAD BONE", 2)):
    source, target = Path(keyword), Path(keyword + "_out")
    target.mkdir()
    write_ct(source, hu + 1, places, name="a")
    write_ct(source, hu + 2, places, name="b", tags=lambda i: {keyword: value})
    dicom2nifti.convert_directory(source, target)
    written = {p.name: int(nib.load(p).get_fdata().max()) for p in sorted(target.iterdir())}
    print(f"two series that differ in {keyword}: {written}")
    assert len(written) == files, written
PY
