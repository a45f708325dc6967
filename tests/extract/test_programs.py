"""A path as a model: the output of the module that was saved, once its code is trusted."""

import os
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.testing import assert_close

from ctfm.extract.backbone import default_settings
from ctfm.extract.backbones import get_backbone, get_entry, split_path
from ctfm.extract.config import PAPER_WINDOWS_HU
from ctfm.store.errors import BackboneError, ConfigError
from ctfm.store.provenance import file_sha256

S, Y, X, D = 3, 10, 14, 6
DESCRIBED: dict[str, Any] = {"size_px": [Y, X], "tokens": {"cls": D}}
TWO = {"size_px": [Y, X], "tokens": {"cls": D, "mean": 3}}
VOLUME = {
    "size_px": [5, Y, X],
    "tokens": {"cls": D},
    "windows_hu": [[0, 100], [-500, 500], [-1000, 1000]],
    "in_plane_mm": 2.0,
    "slice_mm": 3.0,
    "pad_hu": 0.0,
}


class Network(nn.Module):
    """Small, with parameters and a buffer; gives one output or two, by order or by name."""

    def __init__(self, outputs: str = "one") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, D)
        self.shift = nn.Buffer(torch.randn(3))
        self.outputs = outputs

    def forward(self, pixels: Tensor) -> Any:
        mean = pixels.flatten(2).mean(dim=2) + self.shift
        cls = self.linear(mean)
        if self.outputs == "one":
            return cls
        return (cls, mean) if self.outputs == "two" else {"mean": mean, "cls": cls}


def export(module: nn.Module, file: Path, *, size: tuple[int, ...] = (Y, X)) -> None:
    example = torch.zeros(2, 3, *size)
    samples = ({0: Dim("samples", min=1, max=4096)},)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=samples), file)


def script(module: nn.Module, file: Path, *, size: tuple[int, ...] = (Y, X)) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        traced: Any = torch.jit.trace(module, torch.zeros(2, 3, *size), strict=False)  # type: ignore[no-untyped-call]
        traced.save(file)


SAVE: dict[str, Callable[..., None]] = {"model.pt2": export, "model.pt": script}


@pytest.fixture(params=SAVE)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a program of either kind goes."""
    return tmp_path / str(request.param)


def saved(file: Path, said: dict[str, Any], module: nn.Module | None = None) -> nn.Module:
    module = (Network() if module is None else module).eval()
    size_px = tuple(said["size_px"])
    SAVE[file.name](module, file, size=size_px)
    file.with_suffix(".toml").write_text(tomli_w.dumps(said))
    return module


def load(file: Path) -> Any:
    return get_backbone(str(file), trust_remote_code=True)


@pytest.mark.parametrize("count", [1, S])
def test_gives_what_the_saved_module_gives(file: Path, count: int) -> None:
    module = saved(file, DESCRIBED)
    backbone = load(file)
    channels = torch.rand(count, 3, Y, X)
    with torch.inference_mode():
        assert_close(backbone.embed(channels)["cls"], module(channels))
    assert backbone.tokens == {"cls": D}
    assert backbone.name == file.name


@pytest.mark.parametrize("outputs", ["two", "named"])
def test_several_outputs_are_the_tokens_in_their_order_or_by_name(file: Path, outputs: str) -> None:
    module = saved(file, TWO, Network(outputs))
    channels = torch.rand(S, 3, Y, X)
    embedded = load(file).embed(channels)
    with torch.inference_mode():
        expected = module(channels)
    cls, mean = expected if outputs == "two" else (expected["cls"], expected["mean"])
    assert_close(embedded["cls"], cls)
    assert_close(embedded["mean"], mean)


def test_the_description_decides_what_goes_in(file: Path) -> None:
    said = {
        "windows_hu": [[0, 80], [-20, 180], [-1000, 1000]],
        "mean": [0.1, 0.2, 0.3],
        "sd": [0.5, 0.6, 0.7],
        "interpolation": "bicubic",
        "antialias": False,
    }
    saved(file, {**DESCRIBED, **said})
    backbone = load(file)
    assert default_settings(backbone.entry)["windows_hu"][2] == (-1000, 1000)
    digest = file_sha256(file)
    assert backbone.settings() == {
        "weights": digest,
        "remote_code": digest,
        "input": "windows",
        "size_px": [Y, X],
        "mean": said["mean"],
        "sd": said["sd"],
        "interpolation": "bicubic",
        "antialias": False,
    }


def test_a_size_of_three_axes_is_that_of_whole_scans(file: Path) -> None:
    module = saved(file, VOLUME)
    backbone = load(file)
    assert backbone.entry.unit == "volume"
    settings = default_settings(backbone.entry)
    assert (settings["in_plane_mm"], settings["slice_mm"]) == (2.0, 3.0)
    assert (settings["size_px"], settings["max_slices"]) == (X, 5)
    channels = backbone.channels(
        torch.full((4, X, X), 50, dtype=torch.int16), settings["windows_hu"]
    )
    assert channels.shape == (1, 3, 5, Y, X)
    with torch.inference_mode():
        assert_close(backbone.embed(channels)["cls"], module(channels))


def test_without_windows_the_papers_hold(file: Path) -> None:
    saved(file, DESCRIBED)
    entry = get_entry(str(file))
    assert default_settings(entry)["windows_hu"] == PAPER_WINDOWS_HU
    assert entry.channels == 3


def test_a_program_is_not_opened_unless_it_is_trusted(tmp_path: Path) -> None:
    """A planted pickle, in a part that torch opens whatever the program is."""

    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    whole, planted = tmp_path / "model.pt2", tmp_path / "planted.pt2"
    saved(whole, DESCRIBED)
    inputs = BytesIO()
    torch.save((Runs(),), inputs)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(planted, "w") as target:
        for record in source.infolist():
            is_inputs = "sample_inputs" in record.filename
            content = inputs.getvalue() if is_inputs else source.read(record)
            target.writestr(record.filename, content)
    planted.with_suffix(".toml").write_text(tomli_w.dumps(DESCRIBED))
    with pytest.raises(BackboneError, match="pass --trust-remote-code if you trust its author"):
        get_backbone(str(planted))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(BackboneError, match="cannot be opened"):  # its inputs are no inputs
        load(planted)
    assert (tmp_path / "ran").exists()


def test_the_facts_are_known_without_opening_it(file: Path) -> None:
    saved(file, DESCRIBED)
    entry = get_entry(str(file))
    assert entry.tokens == {"cls": D}
    assert entry.size_px == (Y, X)
    assert entry.remote_code is None


def test_in_a_store_a_program_has_the_name_of_its_file(file: Path) -> None:
    saved(file, DESCRIBED)
    assert split_path(str(file)) == (file.name, file)
    again = get_backbone(file.name, file, trust_remote_code=True)
    assert again.settings() == load(file).settings()
    assert again.name == file.name


def test_a_folder_of_a_family_has_its_name_and_a_repository_keeps_its_own(tmp_path: Path) -> None:
    assert split_path(f"hf:{tmp_path}") == (f"hf:{tmp_path.name}", tmp_path)
    for name in ("hf:org/name", "timm:resnet50", "dinov3-base", "openclip:ViT-B-32"):
        assert split_path(name) == (name, None)


def test_it_computes_in_the_type_in_which_it_was_saved(file: Path) -> None:
    saved(file, DESCRIBED)
    with pytest.raises(ConfigError, match="float32, not bfloat16"):
        load(file).to("cpu", "bfloat16")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tokens": {"cls": D}}, r"size_px must be \[y, x\], or \[z, y, x\]"),
        ({"size_px": [Y, X]}, "tokens must name each output"),
        ({**DESCRIBED, "tokens": {"cls": 0}}, "tokens must name each output"),
        ({**DESCRIBED, "size": 3}, "unknown field size, known are tokens"),
        ({**DESCRIBED, "mean": [0.5]}, "a number for each of the 3 windows"),
        ({**DESCRIBED, "mean": [0, 0, 0], "sd": [1, 0, 1]}, "an sd more than 0"),
        ({**DESCRIBED, "interpolation": "nearest"}, "bilinear or bicubic"),
        ({**DESCRIBED, "antialias": "yes"}, "true or false"),
        ({**DESCRIBED, "slice_mm": 4.0}, "slice_mm is of whole scans"),
        ({**DESCRIBED, "size_px": [0, X]}, "size_px must be positive"),
        ({**DESCRIBED, "tokens": {"cls": 5}}, r"gives \{'cls': \(1, 6\)\} for 1 samples"),
        ({**DESCRIBED, "windows_hu": [[0, 80]]}, "does not run on 1 samples"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    tmp_path: Path, said: dict[str, Any], message: str
) -> None:
    export(Network(), tmp_path / "model.pt2")
    (tmp_path / "model.toml").write_text(tomli_w.dumps(said))
    with pytest.raises(BackboneError, match=message):
        load(tmp_path / "model.pt2")


def test_a_program_for_one_number_of_samples_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Network(), (torch.zeros(1, 3, Y, X),)), file)
    file.with_suffix(".toml").write_text(tomli_w.dumps(DESCRIBED))
    with pytest.raises(BackboneError, match=r"does not run on 2 samples.*torch\.export\.Dim"):
        load(file)


class Training(Network):
    """As one that was saved in training mode: it drops inputs at random."""

    def forward(self, pixels: Tensor) -> Any:
        return super().forward(nn.functional.dropout(pixels, 0.2, training=True))


def test_a_program_that_draws_at_random_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "model.pt2", DESCRIBED, Training())
    with pytest.raises(BackboneError, match=r"model\.pt2 gives other tokens each time"):
        load(tmp_path / "model.pt2")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    with pytest.raises(BackboneError, match="no program at"):
        load(file)
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(BackboneError, match=r"its content: torch\.save\): weights go to --weights"):
        load(file)
    export(Network(), file)
    with pytest.raises(BackboneError, match=r"write model\.toml beside it, with size_px"):
        load(file)
