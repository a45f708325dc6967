#!/usr/bin/env bash
# dcmqi 1.5.7: a mask that goes to DICOM SEG and back no longer has the slices of its CT.
#
# Input: a mask of a bleed in slices 3 to 8 of a head of 12 slices, by itkimage2segimage to a SEG
#        and by segimage2itkimage back to NIfTI; then the same on slices 5 mm and 10 mm apart.
# Guess: the mask comes back on the grid of the CT.
# Seen:  it comes back with 6 slices of 12 and another origin: only the slices from the first to
#        the last that are not empty. On unequal spacing its frames lie at the mean spacing that
#        ITK made up, up to 14 mm from the images that they were drawn on, and exit status is 0.
# Why:   mask[scan > x] fails or, where sizes happen to agree, pairs the wrong slices. Resample
#        every mask that comes from a SEG onto its CT by position.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet dcmqi==1.5.7 SimpleITK==2.5.7 pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
import json
import subprocess
from pathlib import Path

import numpy as np
import SimpleITK as sitk
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


meta = {
    "ContentCreatorName": "Reader",
    "ClinicalTrialSeriesID": "1",
    "ClinicalTrialTimePointID": "1",
    "SeriesDescription": "bleed",
    "SeriesNumber": "300",
    "InstanceNumber": "1",
    "segmentAttributes": [
        [
            {
                "labelID": 1,
                "SegmentDescription": "bleed",
                "SegmentAlgorithmType": "MANUAL",
                "SegmentedPropertyCategoryCodeSequence": {
                    "CodeValue": "49755003",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Morphologically Altered Structure",
                },
                "SegmentedPropertyTypeCodeSequence": {
                    "CodeValue": "50960005",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Hemorrhage",
                },
            }
        ]
    ],
}
Path("meta.json").write_text(json.dumps(meta))
mask = np.zeros((12, 32, 32), np.uint8)
mask[3:9, 10:20, 10:20] = 1
for name, z in (("equal", np.arange(12) * 4), ("unequal", np.cumsum([0] + [5] * 6 + [10] * 5))):
    write_ct(Path(name), np.zeros(mask.shape), [(-16, -16, v) for v in z])
    scan = sitk.ReadImage([str(p) for p in sorted(Path(name).iterdir())])
    drawn = sitk.GetImageFromArray(mask)
    drawn.CopyInformation(scan)
    sitk.WriteImage(drawn, f"{name}.nii.gz")
    for command in (
        f"itkimage2segimage --inputImageList {name}.nii.gz --inputDICOMDirectory {name}"
        f" --outputDICOM {name}.dcm --inputMetadata meta.json",
        f"segimage2itkimage --inputDICOM {name}.dcm --outputDirectory . --outputType nii -p {name}",
    ):
        tool, *options = command.split()
        subprocess.run([f"venv/bin/{tool}", *options], check=True, capture_output=True)
    back = sitk.ReadImage(f"{name}-1.nii.gz")
    frames = [back.TransformIndexToPhysicalPoint((0, 0, k))[2] for k in range(back.GetSize()[2])]
    off = np.abs(np.array(frames) - z[3:9]).max()
    print(
        f"{name}: {scan.GetSize()[2]} slices of CT, {len(frames)} of mask, at {np.round(frames, 1)}, off by {off:.1f} mm"
    )
    assert scan.GetSize()[2] == 12 and len(frames) == 6 and (off > 5) == (name == "unequal")
PY
