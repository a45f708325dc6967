#!/usr/bin/env bash
# dicom-anonymizer 2.1.0: a head without contrast gets a contrast agent by being de-identified.
#
# Input: native CT heads whose ContrastBolusAgent is empty or "NONE", as scanners write it, one
#        with an agent, one without the element.
# Guess: the agent is kept (it names no person) or emptied.
# Seen:  empty, "NONE" and the agent's name all become "ANONYMIZED"; only the absent element stays
#        absent. PatientID becomes empty for every patient, with a StudyDate of the year 1.
# Why:   a pipeline that leaves out series with a contrast agent leaves out every native head; one
#        that does not look at the value can no longer tell them. Splits by patient see one
#        patient.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet dicom-anonymizer==2.1.0 pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
from pathlib import Path

import numpy as np
from dicomanonymizer import anonymize
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


hu = np.zeros((2, 16, 16))
agents = {"empty": "", "none": "NONE", "agent": "Iohexol 350", "absent": None}
for number, (name, agent) in enumerate(agents.items()):
    tags = {"PatientID": f"P{number}"} | ({} if agent is None else {"ContrastBolusAgent": agent})
    write_ct(Path(name), hu, [(-8, -8, 4 * i) for i in range(2)], tags=lambda i: tags)
    out = Path(name + "_out")
    out.mkdir()
    anonymize(name, str(out), {}, True)
    d = dcmread(next(out.iterdir()))
    seen = d.get("ContrastBolusAgent")
    print(f"agent {agent!r:14} becomes {seen!r:14} patient {d.PatientID!r}, date {d.StudyDate}")
    assert seen == (None if agent is None else "ANONYMIZED")
    assert d.PatientID == "" and d.StudyDate == "00010101"
PY
