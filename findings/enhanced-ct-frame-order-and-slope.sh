#!/usr/bin/env bash
# SimpleITK 2.5.7 and dcm2niix 1.0.20260724: what holds per frame of an Enhanced CT is not read.
#
# Input: two valid objects made by highdicom 0.28.2 from single files, 12 slices 4 mm apart, HU =
#        10 a slice: one whose frames are stored in another order, one with another RescaleSlope
#        (1, 0.5) in every other frame, as in the single files.
# Guess: both sort frames by position and apply each frame's slope, as they do for single files.
# Seen:  other order: dcm2niix sorts, SimpleITK keeps the stored order and says 1 mm a slice. slope
#        per frame: dcm2niix takes one slope for all, SimpleITK too: every other slice has twice or
#        half its HU. highdicom reads both rightly; from single files both are right. No message.
# Why:   DICOM says that the order of frames means nothing, and scanners fit the slope to the
#        slice.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet \
  highdicom==0.28.2 dcm2niix==1.0.20260724 SimpleITK==2.5.7 nibabel==5.4.2 pydicom==3.0.2 \
  numpy==2.4.6
venv/bin/python - <<'PY'
import subprocess
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import SimpleITK as sitk
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


n = 12
truth = 10 * np.arange(n)
hu = np.broadcast_to(truth[:, None, None], (n, 16, 16))
places = [(-8, -8, 4 * i) for i in range(n)]


def slope(i):
    tags = {"RescaleSlope": "1" if i % 2 == 0 else "0.5"}
    return tags | {"PixelData": (hu[i] * (1 + i % 2)).astype("<i2").tobytes()}


def niix(folder):
    command = ["venv/bin/dcm2niix", "-z", "n", "-b", "n", "-f", "ct", "-o", folder, folder]
    subprocess.run(command, check=True, capture_output=True)
    return nib.load(folder / "ct.nii").get_fdata()[8, 8].astype(int)


for name, tags in (("order", lambda i: {}), ("slope", slope)):
    folder, out = Path(name), Path(name + "_object")
    write_ct(folder, hu, places, tags=tags)
    d = hd.legacy.LegacyConvertedEnhancedCTImage(
        [dcmread(p) for p in sorted(folder.iterdir())], hd.UID(), 3, hd.UID(), 1
    )
    if name == "order":
        order = np.random.default_rng(0).permutation(n)
        pixels, frames = d.pixel_array[order], list(d.PerFrameFunctionalGroupsSequence)
        d.PerFrameFunctionalGroupsSequence = [frames[k] for k in order]
        d.PixelData = pixels.tobytes()
    out.mkdir()
    d.save_as(out / "enhanced.dcm")
    right = hd.imread(out / "enhanced.dcm").get_volume()
    by_position = right.array[:, 8, 8][:: int(np.sign(right.affine[2, 0]))].astype(int)
    itk = sitk.ReadImage(str(out / "enhanced.dcm"))
    seen = sitk.GetArrayViewFromImage(itk)[:, 8, 8].astype(int)
    object_, files = niix(out), niix(folder)
    print(f"{name}: SimpleITK {seen}, {itk.GetSpacing()[2]} mm")
    print(f"       dcm2niix  {object_}, from single files {files}, highdicom {by_position}")
    assert np.array_equal(by_position, truth) and np.array_equal(files, truth)
    if name == "order":
        assert np.array_equal(seen, pixels[:, 8, 8]) and itk.GetSpacing()[2] == 1.0
        assert np.array_equal(object_, truth)
    else:
        assert not np.array_equal(seen[::-1], truth) and not np.array_equal(seen, truth)
        assert not np.array_equal(object_, truth)
PY
