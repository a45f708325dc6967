#!/usr/bin/env bash
# dcm2niix 1.0.20260724: of three HTJ2K transfer syntaxes it reads two, not the one archives send.
#
# Input: a lossless HTJ2K CT series under 1.2.840.10008.1.2.4.201 (lossless), .202 (lossless, RPCL
#        order) and .203; the very same codestreams, in RPCL order and with TLM markers.
# Guess: all three or none: the decoder is the same.
# Seen:  .201 and .203 are converted exactly, .202 is passed over ("No valid DICOM images").
#        pydicom with pylibjpeg-openjpeg and SimpleITK read all three.
# Why:   .202 is the one made for streaming, and the one in which cloud archives store and send.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet \
  dcm2niix==1.0.20260724 SimpleITK==2.5.7 imagecodecs==2026.3.6 nibabel==5.4.2 pydicom==3.0.2 \
  pylibjpeg==2.1.0 pylibjpeg-openjpeg==2.6.0 numpy==2.4.6
venv/bin/python - <<'PY'
import subprocess
from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
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


hu = np.random.default_rng(0).integers(-1000, 1500, (6, 64, 64))
write_ct(Path("plain"), hu, [(-32, -32, 4 * i) for i in range(6)])
for end in ("201", "202", "203"):
    folder = Path(end)
    folder.mkdir()
    for i, path in enumerate(sorted(Path("plain").iterdir())):
        d = dcmread(path)
        code = imagecodecs.htj2k_encode(hu[i].astype(np.int16), reversible=True, tlm=True)
        d.PixelData = encapsulate([bytes(code)])
        d.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.4.{end}"
        d.save_as(folder / path.name)
    out = Path(end + "_out")
    out.mkdir()
    command = ["venv/bin/dcm2niix", "-z", "n", "-b", "n", "-f", "ct", "-o", out, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    niix = "not read"
    if (out / "ct.nii").exists():
        data = np.asarray(nib.load(out / "ct.nii").dataobj)
        niix = "exact" if np.array_equal(data.transpose(2, 1, 0)[:, ::-1], hu) else "other values"
    one = folder / "s03.dcm"
    itk = np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(one)))[0], hu[3])
    print(
        f".{end}: dcm2niix {niix} (exit {done.returncode}), pydicom {np.array_equal(dcmread(one).pixel_array, hu[3])}, SimpleITK {itk}"
    )
    assert niix == ("not read" if end == "202" else "exact") and itk
    assert np.array_equal(dcmread(one).pixel_array, hu[3])
PY
