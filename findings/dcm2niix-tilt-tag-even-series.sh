#!/usr/bin/env bash
# dcm2niix 1.0.20260724: an evenly spaced series with a tilt in its header is called uneven.
#
# Input: 30 slices at exactly 4 mm, axial, or oblique with positions along the normal (no shear),
#        with and without GantryDetectorTilt = 18.5, as scanners leave it in reconstructed series.
# Guess: nothing to correct, one file.
# Seen:  with the tag a second file ct_Eq_1.nii, "Interslice distance varies", though no distance
#        does. The oblique one is resampled to 31 slices and its HU change by hundreds. Without the
#        tag one file. Exit status 0.
# Why:   `*.nii` then finds two scans of one patient, and one of them has smoothed slices.
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


n, tilt = 30, 18.5
hu = np.full((n, 64, 64), -1000)
hu[2:28, 12:52, 12:52], hu[10:12, 20:30, 20:30] = 30, 1000
sin, cos = np.sin(np.deg2rad(tilt)), np.cos(np.deg2rad(tilt))
series = {
    "axial": (0.0, [(-32, -32, 4 * i) for i in range(n)]),
    "oblique": (tilt, [(-32, -32 + 4 * sin * i, 4 * cos * i) for i in range(n)]),
}
for name, (angle, positions) in series.items():
    for tag in ("0", "18.5"):
        folder = Path(f"{name}_{tag}")
        write_ct(folder, hu, positions, tilt=angle, tags=lambda i: {"GantryDetectorTilt": tag})
        images, log = convert(folder)
        varies = "Interslice distance varies" in log
        print(
            f"{name:8} tag {tag:5} {dict((k, v.shape[2]) for k, v in images.items())} 'varies': {varies}"
        )
        assert list(images) == (["ct.nii", "ct_Eq_1.nii"] if tag == "18.5" else ["ct.nii"])
        assert varies == (tag == "18.5")
        if tag == "18.5" and name == "oblique":
            plain, twin = (np.asarray(image.dataobj).astype(int) for image in images.values())
            change = np.abs(plain - twin[..., :n]).max()
            print(f"         largest change of a voxel {change} HU")
            assert twin.shape[2] == n + 1 and change > 500
PY
