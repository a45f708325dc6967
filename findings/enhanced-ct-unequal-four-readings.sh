#!/usr/bin/env bash
# highdicom 0.28.2, dcm2niix 1.0.20260724, SimpleITK 2.5.7: an unequally spaced head becomes
# another one by being stored as a legacy converted Enhanced CT, as archives do.
#
# Input: 12 slices, 5 mm and then 10 mm apart, as single files and as one object by highdicom's
#        LegacyConvertedEnhancedCTImage.
# Guess: each tool treats the object as it treats the single files.
# Seen:  along z in mm     single files           one object
#        dcm2niix          5.00 + resampled twin  7.27 (mean), no twin
#        SimpleITK         7.27 (mean), warning   1.00, no warning
#        highdicom         raises                 raises
# Why:   the same images, moved by an archive, give a head of another height in both converters.
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


z = np.cumsum([0] + [5] * 6 + [10] * 5)
write_ct(Path("files"), np.zeros((12, 32, 32)), [(-16, -16, v) for v in z])
slices = [dcmread(p) for p in sorted(Path("files").iterdir())]
enhanced = hd.legacy.LegacyConvertedEnhancedCTImage(slices, hd.UID(), 3, hd.UID(), 1)
Path("object").mkdir()
enhanced.save_as("object/enhanced.dcm")
seen = {}
for folder in ("files", "object"):
    out = Path(folder + "_out")
    out.mkdir()
    command = ["venv/bin/dcm2niix", "-z", "n", "-b", "n", "-f", "ct", "-o", out, folder]
    subprocess.run(command, check=True, capture_output=True)
    steps = {p.name: nib.load(p).affine[2, 2] for p in sorted(out.glob("*.nii"))}
    names = [str(p) for p in sorted(Path(folder).iterdir())]
    itk = sitk.ReadImage(names if folder == "files" else names[0]).GetSpacing()[2]
    seen[folder] = steps, itk
    print(
        f"{folder:7} dcm2niix {dict((k, round(float(v), 2)) for k, v in steps.items())}  SimpleITK {itk:.2f}"
    )
mean = z[-1] / 11
files, one = seen["files"], seen["object"]
assert list(files[0]) == ["ct.nii", "ct_Eq_1.nii"] and np.isclose(files[0]["ct.nii"], 5)
assert list(one[0]) == ["ct.nii"] and np.isclose(one[0]["ct.nii"], mean, atol=0.01)
assert np.isclose(files[1], mean, atol=0.01) and one[1] == 1.0
try:
    hd.imread("object/enhanced.dcm").get_volume()
    raise SystemExit("highdicom made a volume of it")
except RuntimeError as error:
    print("highdicom:", error)
PY
