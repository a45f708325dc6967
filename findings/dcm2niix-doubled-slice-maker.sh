#!/usr/bin/env bash
# dcm2niix 1.0.20260724: what a repeated slice becomes depends on the maker's name.
#
# Input: 30 slices 4 mm apart and, as the 31st image, the eleventh again, as a repeat leaves it.
# Guess: the repeated image is dropped, or kept, the same for every maker.
# Seen:  SIEMENS: dropped, one file, right. Every other maker: 31 slices at the first gap, so that
#        all above the repeat lies 4 mm too high, and a second, resampled file ct_Eq_1.nii.
# Why:   a cohort of several makers gets one geometry error that follows the scanner, that is, the
#        hospital: a shortcut for a network. Exit status 0 in every case.
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


z = [*range(0, 120, 4), 40]
hu = np.broadcast_to(np.array(z)[:, None, None], (31, 32, 32))
for maker in ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips", "TOSHIBA", "Canon Medical Systems"):
    write_ct(Path(maker), hu, [(-16, -16, v) for v in z], tags=lambda i: {"Manufacturer": maker})
    images, _ = convert(Path(maker))
    plain = images["ct.nii"]
    top = plain.affine[2, 3] + plain.affine[2, 2] * (plain.shape[2] - 1)
    print(
        f"{maker:22} {list(images)}  {plain.shape[2]} slices, top slice at {top:.0f} mm (true 116)"
    )
    if maker == "SIEMENS":
        assert list(images) == ["ct.nii"] and plain.shape[2] == 30 and round(top) == 116
    else:
        assert (
            list(images) == ["ct.nii", "ct_Eq_1.nii"] and plain.shape[2] == 31 and round(top) == 120
        )
PY
