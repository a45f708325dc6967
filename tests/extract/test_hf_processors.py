"""Image processors, from their files alone, against what transformers makes of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctfm.extract.hf_processors import Preprocessing, read_preprocessing
from ctfm.store.errors import BackboneError

WHOLE = {
    **{"size": 48, "crop_size": 48, "resample": 3, "image_mean": [0.5] * 3},
    **{"image_std": [0.25] * 3, "do_normalize": True},
}
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


def preprocessing(
    folder: Path, said: Any = None, *, model_type: str = "vit", n_channels: int = 3
) -> Preprocessing:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if said is not None:
        write(folder, "preprocessor_config.json", said)
    config = SimpleNamespace(num_channels=n_channels, image_size=(40, 56))
    return read_preprocessing(folder, config)


def write(folder: Path, name: str, said: Any) -> None:
    (folder / name).write_text(json.dumps(said))


def test_what_the_file_leaves_out_is_that_of_transformers_class(tmp_path: Path) -> None:
    vit = preprocessing(tmp_path, {})
    assert (vit.mean, vit.sd, vit.interpolation) == ((0.5,) * 3, (0.5,) * 3, "bilinear")
    assert vit.size_px == (224, 224)
    clip = preprocessing(tmp_path, {"size": {"shortest_edge": 48}}, model_type="clip")
    assert (clip.mean, clip.interpolation) == (OPENAI_MEAN, "bicubic")
    assert clip.size_px == (224, 224)  # of its crop
    assert preprocessing(tmp_path, {"crop_size": 42}, model_type="clip").size_px == (42, 42)


def test_a_processor_inside_processor_config_comes_first(tmp_path: Path) -> None:
    plain = {"size": {"height": 64, "width": 48}, "image_mean": [0.1, 0.2, 0.3]}
    write(tmp_path, "processor_config.json", {"image_processor": {"image_mean": [0.4, 0.5, 0.6]}})
    read = preprocessing(tmp_path, plain)
    assert read.mean == (0.4, 0.5, 0.6)
    assert read.size_px == (224, 224)  # of the class: the two files are not mixed
    write(tmp_path, "processor_config.json", {"processor_class": "CLIPProcessor"})
    read = preprocessing(tmp_path, plain)
    assert (read.mean, read.size_px) == ((0.1, 0.2, 0.3), (64, 48))


def test_a_processor_inside_processor_config_is_read_without_the_other(tmp_path: Path) -> None:
    write(tmp_path, "processor_config.json", {"image_processor": {"size": [64, 48]}})
    assert preprocessing(tmp_path).size_px == (64, 48)


def test_without_a_file_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no preprocessor_config\.json in .*Copy the file"):
        preprocessing(tmp_path)
    write(tmp_path, "processor_config.json", {"processor_class": "CLIPProcessor"})
    with pytest.raises(BackboneError, match=r"no preprocessor_config\.json"):
        preprocessing(tmp_path)


def test_a_processor_of_no_known_class_has_to_say_everything(tmp_path: Path) -> None:
    whole = {"size": 48, "resample": 3, "image_mean": 0.5, "image_std": 0.25}
    assert preprocessing(tmp_path, whole, model_type="own").mean == (0.5,) * 3
    for name in whole:
        rest = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(BackboneError, match=f"does not say {name}"):
            preprocessing(tmp_path, rest, model_type="own")
    unnormalised = {"size": 48, "resample": 3, "do_normalize": False}
    assert preprocessing(tmp_path, unnormalised, model_type="own").sd == (1.0,) * 3


def test_code_of_a_processor_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from pathlib import Path\nPath(__file__).rename('ran')\n")
    said = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    with pytest.raises(BackboneError, match=r"code of its own \(own\.Own\), which is not run"):
        preprocessing(tmp_path, said | WHOLE)
    assert (tmp_path / "own.py").exists()


def test_a_class_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    said = {"image_processor_type": "HeadCTImageProcessor", **WHOLE}
    with pytest.raises(BackboneError, match="HeadCTImageProcessor, which transformers does not kn"):
        preprocessing(tmp_path, said)


@pytest.mark.parametrize(
    "setting",
    [
        {"do_flip_channel_order": True},
        {"do_pad": True, "pad_size": {"height": 40, "width": 40}},
        {"do_clahe": True},
        {"clahe_clip_limit": 2.0},
        {"offset": True},
        {"do_align_long_axis": True},
        {"do_grayscale": True},
        {"keep_aspect_ratio": True},
        {"histogram_equalization": "adaptive"},
    ],
)
def test_what_a_processor_does_and_is_not_done_here_is_refused(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    for model_type in ("vit", "own"):
        with pytest.raises(BackboneError, match=rf"not done here \({next(iter(setting))}: "):
            preprocessing(tmp_path, WHOLE | setting, model_type=model_type)
    off = WHOLE | dict.fromkeys(setting, False)
    assert preprocessing(tmp_path, off) == preprocessing(tmp_path, WHOLE)


def test_a_class_that_swaps_channels_does_so_unless_told_not_to(tmp_path: Path) -> None:
    said = {"image_processor_type": "MobileViTImageProcessor", "size": 48}
    with pytest.raises(BackboneError, match=r"not done here \(do_flip_channel_order: true"):
        preprocessing(tmp_path, said, model_type="mobilevit")


def test_a_class_that_does_not_normalise_does_not_unless_told_to(tmp_path: Path) -> None:
    said = {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": False}
    read = preprocessing(tmp_path, said, model_type="mobilevit")
    assert (read.mean, read.sd) == ((0.0,) * 3, (1.0,) * 3)
    read = preprocessing(tmp_path, said | {"do_normalize": True}, model_type="mobilevit")
    assert (read.mean, read.sd) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "name", ["ViTImageProcessorFast", "BitImageProcessor", "CLIPImageProcessor"]
)
def test_what_changes_no_image_is_let_pass(tmp_path: Path, name: str) -> None:
    said = {"image_processor_type": name, "do_convert_rgb": True, "do_reduce_labels": True}
    more = {"processor_class": "CLIPProcessor", "feature_extractor_type": "ViTFeatureExtractor"}
    assert preprocessing(tmp_path, {**WHOLE, **said, **more}).mean == (0.5,) * 3


def test_an_image_that_is_not_resized_has_the_size_of_the_model(tmp_path: Path) -> None:
    assert preprocessing(tmp_path, {"do_resize": False}).size_px == (40, 56)
    cropped = {"do_resize": False, "do_center_crop": True, "crop_size": 42}
    assert preprocessing(tmp_path, cropped, model_type="dinov2").size_px == (42, 42)


@pytest.mark.parametrize(
    ("size", "size_px"),
    [
        (48, (48, 48)),
        ([48, 32], (48, 32)),
        ({"height": 48, "width": 32}, (48, 32)),
        ({"shortest_edge": 48, "longest_edge": 90}, (48, 48)),
    ],
)
def test_a_size_may_be_written_in_four_ways(
    tmp_path: Path, size: Any, size_px: tuple[int, int]
) -> None:
    assert preprocessing(tmp_path, {"size": size}).size_px == size_px


@pytest.mark.parametrize("size", [{"longest_edge": 40}, [1, 2, 3]])
def test_a_size_that_changes_with_the_image_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(BackboneError, match="only a fixed size will do"):
        preprocessing(tmp_path, {"size": size})


def test_one_value_is_of_every_channel(tmp_path: Path) -> None:
    said = {"image_mean": [0.4], "image_std": 0.2}
    assert preprocessing(tmp_path, said).mean == (0.4,) * 3
    grey = preprocessing(tmp_path, {}, n_channels=1)
    assert (grey.mean, grey.sd) == ((0.5,), (0.5,))


def test_values_of_other_channels_are_refused(tmp_path: Path) -> None:
    said = {"image_mean": [0.4, 0.5, 0.6]}
    with pytest.raises(BackboneError, match="normalises 3 channels, and the model takes 1"):
        preprocessing(tmp_path, said, n_channels=1)


@pytest.mark.parametrize("content", ["{", "3"])
def test_a_file_that_is_no_processor_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(BackboneError, match="is no image processor"):
        preprocessing(tmp_path)
