"""Claim: the head frame of a cropped scan stays, or its standard deviation says that it may not.

Every real head that lies beside the checkout and 20 phantoms are cropped from below, from above,
and by half as much at both ends, in steps of a twentieth of the head's height (of its upper 150 mm
at most) up to half of it. Each crop is aligned, and its frame compared with that of the whole scan:
the angle between them, and how far the vertex has moved along z.

`MEAN_FORM` was fitted to the real heads, so each is also cropped with the form of the others.
A crop counts as told if the angle is at most 3 degrees or two of the reported `frame_sd_deg`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from jaxtyping import Float64
from measure import main_with_out
from scipy.spatial.transform import Rotation

from ctfm.extract import dome
from ctfm.extract.align import HeadFrame, find_head_frame
from ctfm.extract.calvarium import fit_calvarium
from ctfm.extract.coarse import STEP_MM, coarse_scan
from ctfm.extract.phantom_cohort import make_scan
from ctfm.extract.reading import read_volume
from ctfm.extract.symmetry import find_mirror_plane
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError

DATA = Path(__file__).parents[1].parent / "shared" / "data"
HEADS = {
    "ge": "dcm_qa_ct/GE",
    "plastic": "dcm_qa_ct/Philips/S21570/S2010",
    "atlas": "totalsegmentator/ct_brain_atlas_1mm.nii.gz",
    "stripped": "ichseg/scct_stripped_hu.nii.gz",
}
PHANTOMS, SEED, MATRIX = 20, 41, 192
SIDES = ("below", "above", "both")
SHARES = tuple(n / 20 for n in range(1, 11))
HEIGHT_MM = 150.0
"""Below it lie face and neck, whose loss changes nothing."""
TOLD_DEG = 3.0
RIDGE, ROBUST, LOWEST_MM = 0.003, 0.03, -20.0


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What became of the frame of a crop, against that of the whole scan."""

    head: str
    side: str
    cut_mm: float
    angle_deg: float = np.nan
    """NaN if the crop was refused."""
    vertex_mm: float = np.nan
    frame_sd_deg: float = np.nan
    vertex_sd_mm: float = np.nan
    reason: str = "ok"

    @property
    def told(self) -> bool:
        """Whether the frame stayed, or might turn by its own account."""
        return bool(self.angle_deg <= max(TOLD_DEG, 2 * self.frame_sd_deg))

    def line(self) -> str:
        """As a line of a table."""
        numbers = (self.angle_deg, self.frame_sd_deg, self.vertex_mm, self.vertex_sd_mm)
        text = ",".join(f"{number:.2f}" for number in numbers)
        return f"{self.head},{self.side},{self.cut_mm:.1f},{text},{self.reason}"


def real_heads() -> dict[str, Volume]:
    """Those that are there."""
    found = {}
    for name, place in HEADS.items():
        path = DATA / place
        # An index of 300 kB lies beside the images of a folder.
        large = [file for file in sorted(path.rglob("*")) if file.stat().st_size > 400_000]
        if path.exists():
            found[name] = read_volume([str(file) for file in large or [path]])
    return found


def cropped(volume: Volume, *, below_mm: float, above_mm: float) -> Volume:
    """The scan without its slices at the ends of the head."""
    scan = coarse_scan(volume)
    head_mm = scan.points_mm(scan.head)[:, 2]
    high_mm = head_mm.max() + STEP_MM / 2
    low_mm = max(head_mm.min() - STEP_MM / 2, high_mm - HEIGHT_MM)
    z_mm = (volume.slice_origin_mm @ scan.world_from_axes)[:, 2]
    kept = (z_mm >= low_mm + below_mm) | (below_mm == 0)
    kept &= (z_mm <= high_mm - above_mm) | (above_mm == 0)
    return replace(volume, hu=volume.hu[kept], slice_origin_mm=volume.slice_origin_mm[kept])


def height_mm(volume: Volume) -> float:
    """Of the head along the normal of the slices."""
    scan = coarse_scan(volume)
    return min(HEIGHT_MM, float(np.ptp(scan.points_mm(scan.head)[:, 2])) + STEP_MM)


def crops(name: str, volume: Volume) -> Iterator[Crop]:
    """Align every crop of a scan."""
    whole, height = find_head_frame(volume), height_mm(volume)
    for side in SIDES:
        for share in SHARES:
            cut_mm = share * height
            below_mm, above_mm = {
                "below": (cut_mm, 0.0),
                "above": (0.0, cut_mm),
                "both": (cut_mm / 2, cut_mm / 2),
            }[side]
            crop = Crop(head=name, side=side, cut_mm=cut_mm)
            part = cropped(volume, below_mm=below_mm, above_mm=above_mm)
            try:
                yield compared(crop, whole, find_head_frame(part))
            except ScanError as error:
                yield replace(crop, reason=error.reason.value)


def compared(crop: Crop, whole: HeadFrame, part: HeadFrame) -> Crop:
    """The crop with the difference of two frames."""
    between = np.linalg.inv(whole.world_from_head) @ part.world_from_head
    return replace(
        crop,
        angle_deg=float(np.rad2deg(Rotation.from_matrix(between[:3, :3]).magnitude())),
        vertex_mm=float(between[2, 3]),
        frame_sd_deg=part.quality["frame_sd_deg"],
        vertex_sd_mm=part.quality["vertex_sd_mm"],
    )


def mean_form(volumes: Mapping[str, Volume]) -> Float64[np.ndarray, " 9"]:
    """The form that the skulls of whole heads share, as `MEAN_FORM` has it.

    The harmonics of degree 3 and 4 are fitted together with the changes of the ellipsoid itself.
    """
    low_orders, form_orders = 6, 9
    normal = RIDGE * len(volumes) * np.eye(form_orders + low_orders)
    pull = np.zeros(form_orders + low_orders)
    for volume in volumes.values():
        scan = coarse_scan(volume)
        skull = fit_calvarium(scan, find_mirror_plane(scan))
        unit = (skull.own_mm / skull.semi_axes_mm)[skull.own_mm[:, 2] > LOWEST_MM]
        squares = (unit**2).sum(axis=1)
        off = (squares - 1) / 2
        x, y, z = unit.T / np.sqrt(squares)
        low = np.stack([y, z, y * z, x * x, y * y, z * z], axis=1)
        system = np.concatenate([dome.harmonics(unit), low], axis=1)
        weighted = system / np.sqrt(1 + (off / ROBUST) ** 2)[:, None]
        normal += system.T @ weighted / len(off)
        pull += weighted.T @ off / len(off)
    form: Float64[np.ndarray, " 9"] = 1000 * np.linalg.solve(normal, pull)[:form_orders]
    return form


def summary(found: list[Crop]) -> dict[str, object]:
    """Per side and depth of the cut: how far frames turned, and what they said of it."""
    table: dict[str, object] = {}
    for side in SIDES:
        for n, share in enumerate(SHARES):
            own = [crop for crop in found if crop.side == side][n :: len(SHARES)]
            used = [crop for crop in own if crop.reason == "ok"]
            if not used:
                table[f"{side} {share:.2f}"] = {"refused": len(own)}
                continue
            angles = [crop.angle_deg for crop in used]
            table[f"{side} {share:.2f}"] = {
                "refused": len(own) - len(used),
                "angle_deg": f"{np.median(angles):.1f} / {max(angles):.1f}",
                "frame_sd_deg": round(float(np.median([crop.frame_sd_deg for crop in used])), 1),
                "vertex_mm": round(max(abs(crop.vertex_mm) for crop in used), 1),
                "vertex_sd_mm": round(float(np.median([crop.vertex_sd_mm for crop in used])), 1),
                "beyond_3_deg": sum(angle > TOLD_DEG for angle in angles),
                "untold": sum(not crop.told for crop in used),
            }
    return table


def measure() -> dict[str, object]:
    """Crop every head; real ones with the shipped form and with that of the others."""
    heads = real_heads()
    phantoms = [
        crop
        for patient in range(1, PHANTOMS + 1)
        for crop in crops(f"phantom {patient}", make_scan(SEED, patient, matrix=MATRIX).volume)
    ]
    real = [crop for name, volume in heads.items() for crop in crops(name, volume)]
    left_out = []
    for name, volume in heads.items() if len(heads) > 1 else ():
        others = mean_form({other: heads[other] for other in heads if other != name})
        with patch.object(dome, "MEAN_FORM", others):
            left_out += list(crops(name, volume))
    groups = {"phantoms": phantoms, "real": real, "real, form of the others": left_out}
    used = [crop for found in groups.values() for crop in found if crop.reason == "ok"]
    return {
        "claim": f"share of {len(used)} crops whose frame turns by at most {TOLD_DEG:.0f} degrees, "
        "or two of its reported standard deviations",
        "ratio": sum(crop.told for crop in used) / len(used),
        "mean_form": np.round(mean_form(heads), 1).tolist() if heads else [],
        "angle_deg": "median / largest",
        "crops": {name: summary(found) for name, found in groups.items() if found},
        "columns": "head,side,cut_mm,angle_deg,frame_sd_deg,vertex_mm,vertex_sd_mm,reason",
        "raw": {name: [crop.line() for crop in found] for name, found in groups.items()},
    }


if __name__ == "__main__":
    main_with_out(measure)
