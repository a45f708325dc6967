"""Small backbones, weights by a recipe, a scanner of one known object, files that mean harm.

The scanner makes series of which every voxel has a value that tells its place.

HU are linear in world coordinates, with another factor along each axis. A volume is right if the
value of each voxel belongs to the place that the volume says it has: whatever the order of files
and slices, the orientation of the planes, their spacing and their encoding.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pytest
import torch
from hf_folders import write_processor
from jaxtyping import Float, Int16
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian
from safetensors.torch import save_file
from torch import Tensor

from ctfm.extract.backbone import Backbone, BackboneEntry, load_backbone
from ctfm.extract.backbones import BACKBONES, get_backbone
from ctfm.extract.index import index
from ctfm.extract.reading import read_volume
from ctfm.extract.volume import Volume
from ctfm.store.catalogue import Catalogue, read_catalogue

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
HU_PER_MM_LPS = np.array([3.0, -5.0, 7.0])


@dataclass(frozen=True)
class Scanner:
    """Writes planes of the object, in LPS as DICOM has it, and checks what is read back."""

    rows: int = 12
    columns: int = 10
    pixel_mm: tuple[float, float] = (4.0, 5.0)
    centre_mm: tuple[float, float, float] = field(default=(6.0, -9.0, 20.0))

    def hu(self, origin_mm: Sequence[float], axes: Sequence[float]) -> Int16[np.ndarray, "y x"]:
        """The object in the plane with this first voxel and these directions."""
        y, x = np.indices((self.rows, self.columns))[..., None]
        along_row, along_column = np.array(axes[:3]), np.array(axes[3:])
        points = (
            np.array(origin_mm)
            + x * self.pixel_mm[1] * along_row
            + y * self.pixel_mm[0] * along_column
        )
        return self._hu_at(points)

    def plane(
        self,
        origin_mm: Sequence[float],
        *,
        axes: Sequence[float] = AXIAL,
        slope: float = 1.0,
        intercept: float = -1024.0,
        dtype: str = "<i2",
        **tags: Any,
    ) -> Dataset:
        """One CT image; tags of None are left out."""
        stored = (self.hu(origin_mm, axes) - intercept) / slope
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.Modality = CTImageStorage, "CT"
        dataset.SOPInstanceUID = pydicom.uid.generate_uid()
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.PatientID, dataset.StudyInstanceUID = "MRN1", "1.2"
        dataset.SeriesInstanceUID = "1.2.1"
        dataset.ImagePositionPatient = [f"{value:.10g}" for value in origin_mm]
        dataset.ImageOrientationPatient = [f"{value:.10g}" for value in axes]
        dataset.PixelSpacing = list(self.pixel_mm)
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:g}", f"{intercept:g}"
        dataset.Rows, dataset.Columns = self.rows, self.columns
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = int(np.issubdtype(np.dtype(dtype), np.signedinteger))
        dataset.PixelData = np.rint(stored).astype(dtype).tobytes()
        for keyword, value in tags.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        return dataset

    def enhanced(self, planes: Sequence[Dataset]) -> Dataset:
        """One enhanced object of plain planes; each frame keeps its own rescale."""
        dataset = planes[0].copy()
        dataset.SOPClassUID = EnhancedCTImageStorage
        dataset.NumberOfFrames = len(planes)
        dataset.PixelData = b"".join(plane.PixelData for plane in planes)
        shared, orientation, measures = Dataset(), Dataset(), Dataset()
        orientation.ImageOrientationPatient = planes[0].ImageOrientationPatient
        measures.PixelSpacing, measures.SliceThickness = planes[0].PixelSpacing, "5"
        shared.PlaneOrientationSequence = Items([orientation])
        shared.PixelMeasuresSequence = Items([measures])
        dataset.SharedFunctionalGroupsSequence = Items([shared])
        groups = []
        for plane in planes:
            group, position, rescale = Dataset(), Dataset(), Dataset()
            position.ImagePositionPatient = plane.ImagePositionPatient
            rescale.RescaleSlope, rescale.RescaleIntercept = (
                plane.RescaleSlope,
                plane.RescaleIntercept,
            )
            rescale.RescaleType = "HU"
            group.PlanePositionSequence = Items([position])
            group.PixelValueTransformationSequence = Items([rescale])
            groups.append(group)
        dataset.PerFrameFunctionalGroupsSequence = Items(groups)
        for keyword in (
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "RescaleSlope",
            "RescaleIntercept",
        ):
            delattr(dataset, keyword)
        return dataset

    def axial(self, z_mm: Sequence[float], **options: Any) -> list[Dataset]:
        """Axial planes at these heights."""
        return [self.plane((-25.0, -30.0, float(z)), **options) for z in z_mm]

    def save(self, planes: Sequence[Dataset], folder: Path, *, name: str = "IM{:04d}") -> list[str]:
        """Write planes, in another order than that of their places."""
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(len(planes)).permutation(len(planes))
        files = []
        for number, i in enumerate(order):
            files.append(str(folder / name.format(number)))
            planes[i].save_as(files[-1], enforce_file_format=True)
        return files

    def reasons(self, *paths: Path) -> dict[str, str]:
        """The reason of each scan under these paths."""
        table = index(list(paths), key=None).scans
        return dict(zip(table["scan_id"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def read_usable(self, *paths: Path) -> tuple[Volume, dict[str, Any]]:
        """The one usable scan under these paths, read and found right, and its line."""
        catalogue = index(list(paths), key=None)
        (line,) = [line for line in catalogue.scans.to_pylist() if line["usable"]]
        volume = read_volume(catalogue.files[line["scan_id"]])
        assert len(volume.hu) == line["n_slices"]
        self.check(volume)
        return volume, line

    def check(self, volume: Volume) -> None:
        """Every voxel has the HU of its place, to the rounding of values and positions."""
        z, y, x = np.indices(volume.hu.shape)[..., None]
        ras = volume.slice_origin_mm[z[..., 0]]
        ras = ras + y * volume.row_step_mm + x * volume.column_step_mm
        expected = self._hu_at(ras * [-1, -1, 1])
        assert np.abs(volume.hu.astype(int) - expected).max() <= 1

    def accounted(self, catalogue: Catalogue, present: int) -> bool:
        """Whether each of the present files is in one line of a catalogue, or counted."""
        listed = [file for files in catalogue.files.values() for file in files]
        counted = sum(catalogue.ignored.values())
        return len(set(listed)) == len(listed) == present - counted

    def _hu_at(self, lps_mm: Float[np.ndarray, "*shape 3"]) -> Int16[np.ndarray, "*shape"]:
        hu = (lps_mm - np.array(self.centre_mm)) @ HU_PER_MM_LPS
        rounded: Int16[np.ndarray, "*shape"] = np.rint(hu).astype(np.int16)
        return rounded


@pytest.fixture(scope="session")
def scanner() -> Scanner:
    return Scanner()


@pytest.fixture(scope="session")
def recode() -> Callable[[str, str], None]:
    """Write a DICOM file anew in a transfer syntax that pydicom does not encode, with GDCM."""
    return _recode


def _recode(file: str, syntax: str) -> None:
    reader, change = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(file)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(file)
    assert writer.Write()
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == syntax


@dataclass(frozen=True)
class Endured:
    """What became of the files of a folder."""

    catalogue: Catalogue
    outcomes: dict[str, str]
    """`ok` or the reason of every scan of the catalogue, usable or not, after its extraction."""

    def of(self, name: str) -> tuple[str, str]:
        """What index and extraction say of the file with this name."""
        files = self.catalogue.files
        (scan_id,) = (one for one in files if any(f.endswith(name) for f in files[one]))
        lines = {line["scan_id"]: line for line in self.catalogue.scans.to_pylist()}
        return lines[scan_id]["reason"], self.outcomes[scan_id]


@pytest.fixture
def endure(tmp_path: Path) -> Callable[[Path], Endured]:
    """Index a folder and extract every line of it: within 10 s a scan and 512 MB a process.

    Whatever a process dies of, or takes longer or more memory for, fails the trial.
    """

    def trial(folder: Path) -> Endured:
        command = [sys.executable, "-c", _TRIAL, str(folder), str(tmp_path / "trial")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        catalogue = read_catalogue(tmp_path / "trial" / "scans.parquet")
        outcomes = {line["scan_id"]: line["reason"] for line in said["lines"]}
        assert set(outcomes) == set(catalogue.files)
        assert [line for line in said["lines"] if line["reason"] == "reader_crashed"] == []
        assert said["slowest_s"] < 10
        assert max(said["peaks_mb"]) < 512
        return Endured(replace(catalogue, ignored=said["ignored"]), outcomes)

    return trial


_TRIAL = """
import json, sys, threading, time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import ctfm.extract.headers as headers
from ctfm.extract.index import index

peaks_mb = {}

def note_peak(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    peaks_mb[process.pid] = int(status.split("VmHWM:")[1].split()[0]) // 1024

def watch():
    while True:
        for child in psutil.Process().children():
            with suppress(psutil.Error, OSError, IndexError):
                if "ctfm.extract.readers" in " ".join(child.cmdline()):
                    note_peak(child)
        time.sleep(0.05)

folder, out = map(Path, sys.argv[1:])
out.mkdir()
headers.FILES_AT_ONCE = headers.MEMBERS_AT_ONCE = 1
moments = [time.monotonic()]
catalogue = index([folder], key=None, progress=lambda *at: moments.append(time.monotonic()))
catalogue.write(out / "scans.parquet")
note_peak(psutil.Process())
threading.Thread(target=watch, daemon=True).start()

import ctfm.extract.pipeline as pipeline  # now, as torch takes more memory than all the rest
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig

scans = catalogue.scans
usable = scans.column_names.index("usable")
scans = scans.set_column(usable, scans.field(usable), [[True] * len(scans)])
pipeline.read_ahead = partial(pipeline.read_ahead, timeout_s=10)
store = pipeline.extract(
    replace(catalogue, scans=scans),
    out / "store",
    get_backbone("intensity"),
    config=ExtractConfig(backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37),
    options=pipeline.Options(workers=2),
).store
assert store.verify().ok
assert len(peaks_mb) > 1
slowest_s = max(b - a for a, b in zip(moments, moments[1:]))
lines = store.scans.select(["scan_id", "reason", "detail"]).to_pylist()
print(json.dumps(dict(
    ignored=catalogue.ignored, slowest_s=slowest_s, peaks_mb=[*peaks_mb.values()], lines=lines
)))
"""


Recipe = Callable[[Mapping[str, tuple[int, ...]], int], dict[str, Tensor]]


@pytest.fixture(scope="session")
def recipe_tensors() -> Recipe:
    """Weights that a fixture was made with, from names, shapes and a seed; see `fixtures/`."""
    return _recipe_tensors


def _recipe_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """One generator, tensors in the order of their names."""
    random = np.random.RandomState(seed)
    made = {}
    for name in sorted(shapes):
        noise = random.standard_normal(shapes[name])
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shapes[name], np.int64)
        elif name.endswith("running_var"):
            values = (1 + 0.3 * np.abs(noise)).astype(np.float32)
        elif len(shapes[name]) == 1:
            values = (0.2 * noise + name.endswith("weight")).astype(np.float32)
        else:
            values = (noise / np.sqrt(np.prod(shapes[name][1:]))).astype(np.float32)
        made[name] = torch.from_numpy(values)
    return made


FIXTURES = Path(__file__).parent / "fixtures"

DINOV3: dict[str, int] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_register_tokens": 4,
}
SIGLIP: dict[str, int | bool] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 7,
    "image_size": 28,
}
DAVIT: dict[str, Sequence[int] | int] = {
    "embed_dim": (8, 16, 24, 32),
    "num_heads": (2, 2, 3, 4),
    "num_groups": (2, 4, 3, 8),
    "depths": (1, 1, 2, 1),
    "window_size": 5,
    "projection_dim": 20,
}


@dataclass(frozen=True)
class SmallBackbones:
    """A small backbone of each kind, from a checkpoint in the layout of the genuine one."""

    recipe_tensors: Recipe

    def write(self, name: str, folder: Path) -> None:
        """Write the random checkpoint of a backbone, always the same, into a new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        kind = name.partition(":")[0].partition("-")[0]
        writers: dict[str, Callable[[str, Path], None]] = {
            "dinov3": self._write_dinov3,
            "medgemma": self._write_siglip,
            "medsiglip": self._write_siglip,
            "medimageinsight": self._write_davit,
            "pillar0": self._write_pillar0,
            "deepcntd": self._write_deepcntd,
            "timm": self._write_timm,
            "hf": self._write_hf,
            "openclip": self._write_openclip,
            "intensity": lambda name, folder: None,
        }
        writers[kind](name, folder)

    def load(self, name: str, folder: Path) -> Backbone:
        """Load a backbone whose checkpoint was written there."""
        if name in _SMALLER:
            return load_backbone(_SMALLER[name](), folder)
        return get_backbone(name, None if name == "intensity" else folder)

    def _write_dinov3(self, name: str, folder: Path) -> None:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        DINOv3ViTModel(DINOv3ViTConfig(**_dinov3_sizes(name))).save_pretrained(folder)

    def _write_siglip(self, name: str, folder: Path) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        head = name == "medsiglip"
        model = SiglipVisionModel(SiglipVisionConfig(**SIGLIP, vision_use_head=head))
        bare = {n.removeprefix("vision_model."): t for n, t in model.state_dict().items()}
        prefix = "vision_model." if head else "vision_tower.vision_model."
        text = {"language_model.model.embed_tokens.weight": torch.ones(3, 2)}
        tensors = {prefix + n: t.clone() for n, t in bare.items()}
        save_file(tensors | text, folder / "model.safetensors")

    def _write_davit(self, name: str, folder: Path) -> None:
        with np.load(FIXTURES / "davit_parity.npz") as fixture:
            shapes = {
                str(n): tuple(map(int, str(shape).split(",")))
                for n, shape in zip(fixture["names"], fixture["shapes"], strict=True)
            }
        save_file(self.recipe_tensors(shapes, 7), folder / "medimageinsigt-v1.0.0.pt")

    def _write_pillar0(self, name: str, folder: Path) -> None:
        from ctfm.extract.atlas import Atlas
        from ctfm.extract.atlas_config import read_config

        with np.load(FIXTURES / "atlas_parity.npz") as fixture:
            config = {"vision_cfg": json.loads(str(fixture["even_config"]))}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = Atlas(read_config(config)).state_dict()
        save_file(
            {f"model.visual.{n}": t for n, t in tensors.items()}, folder / "model.safetensors"
        )

    def _write_deepcntd(self, name: str, folder: Path) -> None:
        from ctfm.extract.densenet3d import DenseNet3d, DenseShape

        network = DenseNet3d(DenseShape(channels=2, blocks=(1, 2), growth=4, stem=8))
        save_file(network.state_dict(), folder / "mine.safetensors")
        (folder / "deepcntd.toml").write_text(
            "windows_hu = [[0, 100], [-500, 500]]\nsize_px = [12, 20, 24]\nslice_mm = 5"
        )

    def _write_timm(self, name: str, folder: Path) -> None:
        import timm

        model = timm.create_model(name.removeprefix("timm:"), num_classes=0)
        for part, parameter in model.named_parameters():
            if "gamma" in part:  # 1e-5 at the start: no layer would have an effect
                parameter.data.fill_(1.0)
        save_file(model.state_dict(), folder / "model.safetensors")

    def _write_hf(self, name: str, folder: Path) -> None:
        from transformers import ViTConfig, ViTModel

        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
        config = ViTConfig(**sizes, intermediate_size=40, image_size=48, patch_size=16)
        ViTModel(config).save_pretrained(folder)
        write_processor(folder, 48)

    def _write_openclip(self, name: str, folder: Path) -> None:
        from ctfm.extract.openclip_models import build

        vision = {"image_size": 32, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8}
        config = {"embed_dim": 20, "vision_cfg": vision}
        tensors = {n: t.contiguous() for n, t in build(config).state_dict().items()}
        save_file(tensors, folder / "open_clip_model.safetensors")
        about = {"model_cfg": config, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(about))


def _dinov3_sizes(name: str) -> dict[str, int | bool | str]:
    from ctfm.extract import dinov3

    released = {"dinov3-base": dinov3.BASE, "dinov3-small-plus": dinov3.SMALL_PLUS}
    return {**released.get(name, dinov3.SEVEN_B), **DINOV3}


def _smaller_dinov3(name: str) -> BackboneEntry:
    from ctfm.extract.dinov3 import tower

    return replace(
        BACKBONES[name],
        tokens={"cls": 24, "mean": 24},
        size_px=(48, 48),
        load=tower(_dinov3_sizes(name)).load,
    )


def _smaller_siglip(name: str) -> BackboneEntry:
    from ctfm.extract.siglip import tower

    sizes = {**SIGLIP, "vision_use_head": name == "medsiglip"}
    return replace(
        BACKBONES[name],
        tokens={"cls": 24, "mean": 24},
        size_px=(28, 28),
        load=tower(sizes).load,
    )


def _smaller_davit(name: str) -> BackboneEntry:
    from ctfm.extract.davit import tower

    return replace(
        BACKBONES[name],
        tokens={"cls": 20, "mean": 32},
        size_px=(72, 60),
        load=tower(DAVIT).load,
    )


_SMALLER: dict[str, Callable[[], BackboneEntry]] = {
    name: partial(smaller, name)
    for smaller, names in (
        (_smaller_dinov3, ("dinov3-base", "dinov3-small-plus", "dinov3-7b")),
        (_smaller_siglip, ("medgemma", "medsiglip")),
        (_smaller_davit, ("medimageinsight",)),
    )
    for name in names
}
"""Entries of the registry whose size is a fact, and not the checkpoint's, in a smaller size."""


@pytest.fixture(scope="session")
def small_backbones(recipe_tensors: Recipe) -> SmallBackbones:
    return SmallBackbones(recipe_tensors)
