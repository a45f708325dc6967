#!/usr/bin/env bash
# dcm2niix 1.0.20260724: the plain file of a tilted head is too short from feet to head.
#
# Input: 30 slices, gantry tilted by 18.5 degrees (both signs), the table moved 4 mm a slice, two
#        dense cubes.
# Guess: ct.nii has the shear of the DICOM positions, and ct_Tilt_1.nii is the same head
#        straightened.
# Seen:  ct.nii is sheared, but its slices stand 4 mm * cos(18.5) = 3.79 mm apart in z: the
#        distance along the normal is laid on the z axis. ct_Tilt_1.nii has the right distances; it
#        lies right for one sign of the tilt and 56 mm too low for the other. From unsigned pixels
#        there is no corrected file at all; exit status 0.
# Why:   head CT is often tilted. A loader that takes the first of two files trains on squeezed
#        heads, and a mask drawn on the other file does not lie on it.
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


def places(image):
    """World positions of the two cubes, and the vector between them, in mm."""
    data = np.asarray(image.dataobj)
    dense = np.argwhere(data > 0)
    halves = dense[dense[:, 0] < 48], dense[dense[:, 0] > 48]
    low, high = (image.affine[:3, :3] @ half.mean(0) + image.affine[:3, 3] for half in halves)
    return low, high - low


n, step = 30, 4.0
hu = np.full((n, 96, 96), -1000)
hu[4:7, 20:29, 20:29] = hu[23:26, 60:69, 70:79] = 1000
positions = [(-48, -48, step * i) for i in range(n)]
unsigned = {"PixelRepresentation": 0, "RescaleIntercept": "-1024"}
for tilt in (18.5, -18.5):
    cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    low = np.array([48 - 24, 48 - 24 * cos, 5 * step - 24 * sin])
    true = np.array([-50, -40 * cos, 19 * step - 40 * sin])
    write_ct(Path(f"signed{tilt}"), hu, positions, tilt=tilt)
    images, _ = convert(Path(f"signed{tilt}"))
    assert list(images) == ["ct.nii", "ct_Tilt_1.nii"]
    print(f"tilt {tilt}: true vector between the cubes {true.round(1)}")
    for name, image in images.items():
        start, vector = places(image)
        moved = start - low
        print(f"  {name:14} vector {vector.round(1)}  first cube off by {moved.round(1)} mm")
        if name == "ct.nii":
            assert abs(vector[2] - true[2] + 19 * step * (1 - cos)) < 0.3
        else:
            assert np.abs(vector - true).max() < 0.6
            assert (np.abs(moved).max() > 10) == (tilt < 0), moved

write_ct(
    Path("unsigned"),
    hu,
    positions,
    tilt=18.5,
    tags=lambda i: unsigned | {"PixelData": (hu[i] + 1024).astype("<u2").tobytes()},
)
images, log = convert(Path("unsigned"))
print("from unsigned pixels:", list(images))
assert list(images) == ["ct.nii"]
assert "Only able to correct gantry tilt for 16-bit integer data" in log
PY
