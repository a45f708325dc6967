"""`intensity`: a slice in HU to a fixed description of its densities; no weights, no download.

The embedded default, and the baseline that a foundation model has to beat. It knows the head
frame (x = 0 is the middle column) and Hounsfield units, and nothing else: every constant below is
anatomy or physics, none is fitted (which groups of numbers to keep, and their scale, was chosen on
simple synthetic heads). What it describes, and what shows there:

    densities inside the skull, by place       hemorrhage, infarct, hydrocephalus, air, calcium
    the same, left minus right                 whatever lies on one side; midline shift
    densities of bone, and of scalp            lysis, craniotomy, swelling, air under the skin
    edges, by region                           sulci, hematoma borders, sutures
    contrast to the surroundings, two scales   focal lesions, whatever their HU
    local mean minus its mirror image          large, faint lesions; which side (signed)
    narrow gaps in bone                        fractures
    areas of the regions                       level of the slice, effacement, atrophy

Places are depth below the inner table (rim, mid, deep, and central: deep and near the midline) by
anterior, middle, posterior third. "Inside" is where bone lies in at least three of the four
directions, which holds for no point outside a convex skull and survives a craniotomy.
Histograms are soft (a value between two bins is shared by them) and enter as the square root of
their share (Hellinger), so that values are of order one and a small lesion is not lost.

Sums are of whole numbers, hence exact in float32: batch size and device do not change a value
beyond the last bits. Expects the field of view of the default grid, 224 mm, at any pixel size.

Axes: s slices, y rows, x columns, p pixels, c cells, l levels, k bins, a thirds, h sides.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, max_pool1d, pad

from ctfm.extract.backbone import BackboneEntry, Loaded, one_source
from ctfm.extract.weights import digest_tensors
from ctfm.store.errors import BackboneError

VERSION = 1
"""Raised whenever a value changes; part of the digest."""

FINE_PX, MID_PX, COARSE_PX = 224, 112, 56
"""1, 2 and 4 mm on the default grid."""

SLICES_AT_ONCE = 16
"""On a CPU: what fits its cache."""

AIR_HU, BONE_HU = -300.0, 250.0
BRAIN_HU = (-20.0, 100.0)

# Regions: the four inside the skull first.
RIM, MID, DEEP, CENTRAL, BONE, SCALP, OUTSIDE = range(7)
INSIDE_REGIONS = 4
DEPTH_BOX = 11
"""Coarse pixels: a box of 44 mm, whose inside share grows by 1/44 per mm of depth."""
HEAD_SHARE, SURROUNDED_SHARE = 0.42, 0.7
"""Of a box of 28 mm. On the edge of a head half of it is head; within a couch less is couch."""
RIM_SHARE, MID_SHARE = 0.5 + 6 / 44, 0.5 + 17 / 44
CENTRAL_HALF_MM, THIRD_HALF_MM = 24.0, 30.0
FIELD_MM = 224.0
RAYS, GAP_RAYS = 512, 4
"""Rays from the centre, 0.9 mm apart at the skull; gaps of up to twice `GAP_RAYS` are seen."""

INSIDE_BINS_HU = (-600, -120, -20, 5, 12, 18, 23, 28, 33, 38, 44, 52, 62, 75, 100, 200)
SIDE_BINS_HU = (-300, 5, 20, 33, 60, 150)
BONE_BINS_HU = (300, 550, 850, 1200, 1700)
SCALP_BINS_HU = (-250, -90, -40, 0, 30, 60, 120)
EDGE_BINS_HU = (5, 15, 45, 140, 450)
CONTRAST_BINS_HU = (-30, -15, -7, -2, 2, 7, 15, 30)
MIRROR_BINS_HU = (2, 5, 10, 20)
GAP_BINS_PERMILLE = (60, 150, 300, 600)
GAIN = 16.0
"""Of a square root of a share; the mean of sixteen shares is 1/16, which becomes 4."""
SIGNED_HU = 2.5
"""What a signed difference of the two sides is divided by."""
PRIOR_PX = 40.0
"""Added to the area of a place before shares are taken, so that a tiny one says little."""


class Histogram(nn.Module):
    """Counts of values per cell, at fine fixed levels, and soft bins made of them.

    Args:
        levels: Lower edges of the levels, growing; a value below the first counts there.
        highest: The largest value that is told from larger ones.
    """

    lut: Tensor

    def __init__(self, levels: Sequence[float], *, highest: int) -> None:
        super().__init__()
        self.lowest = math.floor(levels[0])
        edges = torch.tensor(levels, dtype=torch.float64)
        values = torch.arange(self.lowest, highest + 1, dtype=torch.float64)
        lut = torch.bucketize(values, edges[1:], right=True)
        self.register_buffer("lut", lut.to(torch.int32))
        self.n_levels = len(levels)
        sums = torch.zeros(self.n_levels, dtype=torch.float64).index_add(0, lut, values)
        self.centres = sums / lut.bincount(minlength=self.n_levels)

    def count(
        self, values: Float[Tensor, "s p"], cells: Int[Tensor, "#s p"], *, n_cells: int
    ) -> Float[Tensor, "s c l"]:
        """How many pixels of each cell have each level."""
        index = (values - (self.lowest - 0.5)).clamp_(0, len(self.lut) - 1).to(torch.int32)
        level = self.lut.index_select(0, index.reshape(-1)).view(values.shape)
        slot = (cells * self.n_levels + level).long()
        counts = torch.zeros(
            len(values), n_cells * self.n_levels, dtype=torch.int32, device=values.device
        )
        counts.scatter_add_(1, slot, torch.ones_like(level))
        return counts.view(len(values), n_cells, self.n_levels).to(torch.float32)

    def bins(self, bins: Sequence[float], *, log: bool = False) -> Float[Tensor, "l k"]:
        """Weights that share each level between the two bins around it (hat functions).

        They are multiples of 1/256, which keeps sums exact.
        """
        scale = torch.log if log else lambda values: values
        at = scale(torch.tensor(bins, dtype=torch.float64))
        level = scale(self.centres.clamp_min(0.5) if log else self.centres)
        left = torch.bucketize(level, at).clamp(1, len(bins) - 1) - 1
        share = ((level - at[left]) / (at[left + 1] - at[left])).clamp(0, 1)
        share = (share * 256).round() / 256
        weights = torch.zeros(self.n_levels, len(bins), dtype=torch.float64)
        weights.scatter_(1, left[:, None], (1 - share)[:, None])
        weights.scatter_(1, left[:, None] + 1, share[:, None])
        return weights.to(torch.float32)


def _hu_levels() -> list[float]:
    fat = [-1024, -800, -500, -300, -200, -150, -120, -100, -80, -60]
    brain, clot = range(-40, 110, 2), range(110, 200, 10)
    return [*fat, *brain, *clot, *range(200, 400, 50), *range(400, 2100, 100)]


def _edge_levels() -> list[float]:
    return [0, *dict.fromkeys(round(2 ** (step / 4)) for step in range(40))]


class Intensity(nn.Module):
    """HU to the description of a slice, token `cls`."""

    inside_bins: Tensor
    side_bins: Tensor
    bone_bins: Tensor
    scalp_bins: Tensor
    edges_bins: Tensor
    gaps_bins: Tensor
    contrast_bins: Tensor
    mirror_bins: Tensor
    place: Tensor
    third: Tensor
    rays: Tensor
    ray_place: Tensor
    box_3: Tensor
    box_7: Tensor
    box_11: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hu = Histogram(_hu_levels(), highest=2047)
        self.edge = Histogram(_edge_levels(), highest=1023)
        self.difference = Histogram(range(-60, 61), highest=60)
        scales = {
            "inside": self.hu.bins(INSIDE_BINS_HU),
            "side": self.hu.bins(SIDE_BINS_HU),
            "bone": self.hu.bins(BONE_BINS_HU, log=True),
            "scalp": self.hu.bins(SCALP_BINS_HU),
            "edges": self.edge.bins(EDGE_BINS_HU, log=True),
            "gaps": self.edge.bins(GAP_BINS_PERMILLE, log=True),
            "contrast": self.difference.bins(CONTRAST_BINS_HU),
            "mirror": self.difference.bins(MIRROR_BINS_HU),
        }
        for name, weights in scales.items():
            self.register_buffer(f"{name}_bins", weights)
        for width in (3, 7, DEPTH_BOX):
            self.register_buffer(f"box_{width}", _box(width))
        self.register_buffer("place", _places(MID_PX))
        self.register_buffer("third", _thirds(COARSE_PX))
        rays, ray_place = _rays(FINE_PX)
        self.register_buffer("rays", rays)
        self.register_buffer("ray_place", ray_place)

    def forward(self, hu: Float[Tensor, "s 1 y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """Describe every slice; slices do not see each other."""
        at_once = SLICES_AT_ONCE if hu.device.type == "cpu" else max(len(hu), 1)
        slices = hu[:, 0].to(torch.float32)
        starts = range(0, len(hu), at_once)
        return {"cls": torch.cat([self._describe(slices[i : i + at_once]) for i in starts])}

    def _describe(self, hu: Float[Tensor, "s y x"]) -> Float[Tensor, "s _"]:
        fine = hu.clamp(-1024, 3071)
        if fine.shape[-2:] != (FINE_PX, FINE_PX):
            fine = adaptive_avg_pool2d(fine, (FINE_PX, FINE_PX))
        mid = _halve(fine)
        coarse = _halve(mid)
        head = self._head(mid)
        bone = (mid > BONE_HU) & _enlarge(head, 2)
        inside, share = self._inside(bone)
        region = _regions(mid, head, bone=bone, inside=inside, share=share)
        counts = self._counts(mid, region)
        parts = [
            *self._densities(counts),
            self._edges(mid, region),
            *self._gaps(fine, head),
            *self._local(coarse, _halve(inside.to(torch.float32)), share),
        ]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _head(self, mid: Float[Tensor, "s y x"]) -> Bool[Tensor, "s v u"]:
        """Without couch and head rest (coarse): thin, they fill little of a box of 28 mm."""
        tissue = _halve((mid > AIR_HU).to(torch.float32))
        return self.box_7 @ tissue @ self.box_7 > HEAD_SHARE * 49

    def _inside(
        self, bone: Bool[Tensor, "s y x"]
    ) -> tuple[Bool[Tensor, "s y x"], Float[Tensor, "s v u"]]:
        """Inside the skull (mid), and how many coarse pixels around are inside.

        Dense lesions count as inside: bone that is surrounded by it on all sides.
        """
        enclosed = _enclosed(bone)
        cavity = _halve((enclosed & ~bone).to(torch.float32))
        surrounded = self.box_7 @ cavity @ self.box_7 > SURROUNDED_SHARE * 49
        inside = enclosed & (~bone | _enlarge(surrounded, 2))
        # Not divided by the area of the box yet: whole numbers interpolate exactly.
        return inside, self.box_11 @ _halve(inside.to(torch.float32)) @ self.box_11

    def _counts(
        self, mid: Float[Tensor, "s y x"], region: Int[Tensor, "s y x"]
    ) -> Float[Tensor, "s r a h l"]:
        """Pixels by region, third, side and HU level."""
        cells = (region * 6 + self.place).flatten(1)
        counts = self.hu.count(mid.flatten(1), cells, n_cells=7 * 6)
        return counts.reshape(len(mid), 7, 3, 2, -1)

    def _densities(self, counts: Float[Tensor, "s r a h l"]) -> list[Tensor]:
        """Areas of the regions, and densities of brain, bone and scalp; sum and difference."""
        inside = counts[:, :INSIDE_REGIONS]
        areas = counts[:, :OUTSIDE].sum(dim=-1).sqrt() * GAIN / 60
        return [
            areas.sum(dim=-1),
            _apart(areas),
            _roots(inside.sum(dim=3), self.inside_bins),
            _apart(_roots(inside, self.side_bins).movedim(3, -1)),
            *_together_and_apart(counts[:, BONE], self.bone_bins),
            *_together_and_apart(counts[:, SCALP], self.scalp_bins),
        ]

    def _edges(self, mid: Float[Tensor, "s y x"], region: Int[Tensor, "s y x"]) -> Tensor:
        """Sizes of HU steps over 4 mm, by region."""
        along_x = (mid[..., 1:-1, 2:] - mid[..., 1:-1, :-2]).abs_()
        along_y = (mid[..., 2:, 1:-1] - mid[..., :-2, 1:-1]).abs_()
        step = torch.maximum(along_x, along_y).mul_(0.5)
        cells = region[..., 1:-1, 1:-1].flatten(1)
        counts = self.edge.count(step.flatten(1), cells, n_cells=7)
        return _roots(counts[:, :OUTSIDE], self.edges_bins)

    def _gaps(self, fine: Float[Tensor, "s y x"], head: Bool[Tensor, "s v u"]) -> list[Tensor]:
        """Where a ray from the centre crosses less bone than its neighbours on both sides."""
        dense = (fine - BONE_HU).clamp_(0, 1000).mul_(_enlarge(head, 4))
        along_rays = (
            dense.flatten(1).index_select(1, self.rays.view(-1)).view(len(fine), *self.rays.shape)
        )
        mass = along_rays.sum(dim=1)
        closed = -_dilate(-_dilate(mass))
        drop = (closed - mass) * 1000 / (closed + BONE_HU * 4)
        found = self.edge.count(drop, self.ray_place.view(1, -1), n_cells=6)
        # Nearly every ray meets no gap, which would drown the rest.
        shares = (found.reshape(len(fine), 3, 2, -1) @ self.gaps_bins)[..., 1:] / RAYS
        return [shares.sum(dim=2).sqrt() * GAIN, _apart(shares.sqrt().movedim(2, -1)) * GAIN]

    def _local(
        self,
        coarse: Float[Tensor, "s y x"],
        inside: Float[Tensor, "s y x"],
        share: Float[Tensor, "s y x"],
    ) -> list[Tensor]:
        """Brain against its surroundings, and against its mirror image."""
        brain = coarse.clamp(*BRAIN_HU) * inside
        means = {
            width: (box @ brain @ box) / (box @ inside @ box).clamp_min(0.25)
            for width, box in ((3, self.box_3), (7, self.box_7), (11, self.box_11))
        }
        within = inside >= 0.5
        paired = within & within.flip(-1)
        depth = _depth(share, COARSE_PX)
        region = torch.where(within, depth, INSIDE_REGIONS)
        paired_region = torch.where(paired, depth, INSIDE_REGIONS)
        small = self._of_differences(coarse.clamp(*BRAIN_HU) - means[7], region)
        large = self._of_differences(means[3] - means[11], region)
        mirrors = {width: means[width] - means[width].flip(-1) for width in (3, 7)}
        return [
            _roots(small, self.contrast_bins),
            _roots(large, self.contrast_bins),
            *(
                _roots(self._of_differences(mirror.abs(), paired_region), self.mirror_bins)
                for mirror in mirrors.values()
            ),
            self._signed(mirrors[7], paired_region),
        ]

    def _of_differences(
        self, values: Float[Tensor, "s y x"], region: Int[Tensor, "s y x"]
    ) -> Float[Tensor, "s r l"]:
        cells = region.flatten(1)
        counts = self.difference.count(values.flatten(1), cells, n_cells=INSIDE_REGIONS + 1)
        return counts[:, :INSIDE_REGIONS]

    def _signed(
        self, mirror: Float[Tensor, "s y x"], region: Int[Tensor, "s y x"]
    ) -> Float[Tensor, "s _"]:
        """Mean of left half minus right half of the image, by region and third; in `SIGNED_HU`."""
        left = COARSE_PX // 2
        thirds = self.third[:, :left]
        cells = (region[..., :left] * 3 + thirds).flatten(1).long()
        zeros = mirror.new_zeros(len(mirror), 3 * (INSIDE_REGIONS + 1))
        values = mirror[..., :left].flatten(1).mul(16).round_()
        sums = zeros.scatter_add(1, cells, values) / (16 * SIGNED_HU)
        areas = zeros.scatter_add(1, cells, torch.ones_like(values))
        return (sums / (areas + PRIOR_PX / 4))[:, : 3 * INSIDE_REGIONS]


def _halve(values: Float[Tensor, "s y x"]) -> Float[Tensor, "s v u"]:
    """Means of blocks of 2 × 2; strided sums are several times faster than `avg_pool2d`."""
    rows = values[..., ::2, :] + values[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def _enlarge(values: Bool[Tensor, "s y x"], times: int) -> Bool[Tensor, "s v u"]:
    return values.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)


def _enclosed(bone: Bool[Tensor, "s y x"]) -> Bool[Tensor, "s y x"]:
    """Where bone lies in at least three of the four directions."""
    ones = bone.to(torch.float32)
    directions = torch.zeros_like(ones)
    for dim in (-1, -2):
        before = ones.cumsum(dim)
        total = before.narrow(dim, before.shape[dim] - 1, 1)
        directions += (before - ones) > 0
        directions += (total - before) > 0
    return directions >= 3


def _regions(
    mid: Float[Tensor, "s y x"],
    head: Bool[Tensor, "s v u"],
    *,
    bone: Bool[Tensor, "s y x"],
    inside: Bool[Tensor, "s y x"],
    share: Float[Tensor, "s v u"],
) -> Int[Tensor, "s y x"]:
    smooth = interpolate(share[:, None], size=mid.shape[-2:], mode="bilinear")[:, 0]
    scalp = (mid > AIR_HU) & _enlarge(head, 2)
    outside = OUTSIDE - scalp.to(torch.int32)
    skull = torch.where(bone, BONE, outside)
    return torch.where(inside, _depth(smooth, MID_PX), skull)


def _depth(share: Float[Tensor, "s y x"], size_px: int) -> Int[Tensor, "s y x"]:
    """RIM, MID, DEEP or CENTRAL, from how much of the surroundings is inside the skull."""
    whole = DEPTH_BOX**2
    depth = (share >= RIM_SHARE * whole).to(torch.int32) + (share >= MID_SHARE * whole)
    central = _from_centre_mm(size_px, share.device).abs() < CENTRAL_HALF_MM
    return depth + (central & (depth == DEEP))


def _from_centre_mm(size_px: int, device: torch.device | None = None) -> Float[Tensor, " x"]:
    pixel_mm = FIELD_MM / size_px
    return (torch.arange(size_px, device=device) - (size_px - 1) / 2) * pixel_mm


def _thirds(size_px: int) -> Int[Tensor, "y x"]:
    """0 front, 1 middle, 2 back."""
    y_mm = _from_centre_mm(size_px)[:, None].expand(-1, size_px)
    return (y_mm > -THIRD_HALF_MM).to(torch.int32) + (y_mm > THIRD_HALF_MM)


def _places(size_px: int) -> Int[Tensor, "y x"]:
    """Twice the third, plus 1 on the right half of the image."""
    right = (_from_centre_mm(size_px) > 0).to(torch.int32).expand(size_px, -1)
    return _thirds(size_px) * 2 + right


def _box(width: int) -> Float[Tensor, "y x"]:
    """Ones within a band: on both sides of an image, its sums over squares of `width`."""
    at = torch.arange(COARSE_PX)
    return ((at[:, None] - at).abs() <= width // 2).to(torch.float32)


def _rays(size_px: int) -> tuple[Int[Tensor, "r a"], Int[Tensor, " a"]]:
    """Flat indices of the pixels along rays from the centre, nearest first; and their places."""
    angle = (torch.arange(RAYS, dtype=torch.float64) + 0.5) * (2 * math.pi / RAYS)
    radius = torch.arange(size_px // 8, size_px // 2, dtype=torch.float64)[:, None]
    centre = (size_px - 1) / 2
    y, x = (
        # Rounded away from the centre, so that the left rays mirror the right ones.
        (radius * f(angle)).abs().sub(0.5).round().clamp_min(0).add(0.5) * f(angle).sign() + centre
        for f in (torch.sin, torch.cos)
    )
    flat = (y * size_px + x).to(torch.int32)
    return flat, _places(size_px).view(-1)[flat[-1].long()]


def _dilate(values: Float[Tensor, "s a"]) -> Float[Tensor, "s a"]:
    """Largest value within ±`GAP_RAYS` along the circle."""
    wide = pad(values[:, None], (GAP_RAYS, GAP_RAYS), mode="circular")
    return max_pool1d(wide, 2 * GAP_RAYS + 1, stride=1)[:, 0]


def _roots(
    counts: Float[Tensor, "*cells l"], weights: Float[Tensor, "l k"]
) -> Float[Tensor, "*cells k"]:
    """Square roots of the shares of the soft bins."""
    area = counts.sum(dim=-1, keepdim=True)
    return ((counts @ weights) / (area + PRIOR_PX)).sqrt() * GAIN


def _apart(sides: Float[Tensor, "*cells 2"]) -> Float[Tensor, "*cells"]:
    return (sides[..., 0] - sides[..., 1]).abs()


def _together_and_apart(
    counts: Float[Tensor, "s a h l"], weights: Float[Tensor, "l k"]
) -> tuple[Tensor, Tensor]:
    together = _roots(counts.sum(dim=2), weights)
    return together, _apart(_roots(counts, weights).movedim(2, -1))


def load_intensity(entry: BackboneEntry, weights: Path | None) -> Loaded:
    """Build it; its digest is of its version and of every table that decides a value.

    Raises:
        BackboneError: If weights are given.
    """
    if weights is not None:
        raise BackboneError(f"{entry.name} has no weights, got {weights}: leave them out")
    module = Intensity()
    tables = {**module.state_dict(), "version": torch.tensor(VERSION)}
    return Loaded(module=module, digest=digest_tensors(tables))


ENTRIES = (
    BackboneEntry(
        name="intensity",
        architecture="soft HU histograms by place, edges, asymmetry",
        hub_id=None,
        revision=None,
        licence="Apache-2.0",
        gated=False,
        tokens={"cls": 528},
        parameters=0,
        load=load_intensity,
        sources=one_source("this file"),
        input="hu",
        channels=1,
        takes_key=False,
        precisions=("float32",),
    ),
)
