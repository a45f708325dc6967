"""`openclip:` models against open_clip's own output, from local checkpoints. No network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ctfm.extract.backbone import Asked
from ctfm.extract.backbones import get_backbone
from ctfm.extract.openclip_models import openclip_entry
from ctfm.store.errors import BackboneError

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: ctfm[openclip]")

S, D = 2, 20
VIT = {"image_size": 32, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TIMM = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def saved(vision: dict[str, Any], folder: Path, **more: Any) -> Any:
    """A folder as open_clip puts it on the hub, with random weights; and the model."""
    torch.manual_seed(0)
    config = {"embed_dim": D, "vision_cfg": vision, "text_cfg": TEXT, **more}
    make = (
        open_clip.model.CustomTextCLIP if more.pop("custom_text", False) else open_clip.model.CLIP
    )
    model = make(**{name: value for name, value in config.items() if name != "custom_text"}).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    about = {"model_cfg": config, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return model


@pytest.mark.parametrize(
    ("vision", "more"),
    [
        (VIT, {}),
        (VIT, {"quick_gelu": True}),
        (VIT | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}, {}),
        (RESNET, {}),
        (TIMM, {"custom_text": True}),
    ],
)
def test_gives_the_image_embedding_of_open_clip(
    tmp_path: Path, vision: dict[str, Any], more: dict[str, Any]
) -> None:
    model = saved(vision, tmp_path, **more)
    backbone = get_backbone(f"openclip:{tmp_path}")
    size = vision["image_size"]
    channels = torch.rand(S, 3, size, size)
    with torch.inference_mode():
        pooled = model.encode_image(backbone.pixels(channels))
    expected = pooled[0] if isinstance(pooled, tuple) else pooled
    assert_close(backbone.embed(channels)["cls"], expected, rtol=1e-5, atol=1e-5)
    assert backbone.tokens == {"cls": D}


def test_preprocessing_is_that_of_the_configuration(tmp_path: Path) -> None:
    saved(VIT, tmp_path)
    entry = get_backbone(f"openclip:{tmp_path}").entry
    assert entry.size_px == (32, 32)
    assert (entry.mean, entry.sd) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert entry.interpolation == "bilinear"


def test_an_interpolation_that_there_is_not_is_refused(tmp_path: Path) -> None:
    saved(VIT, tmp_path)
    about = json.loads((tmp_path / "open_clip_config.json").read_text())
    about["preprocess_cfg"]["interpolation"] = "random"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    with pytest.raises(BackboneError, match=r"open_clip_config\.json resizes by random interpol"):
        get_backbone(f"openclip:{tmp_path}")


def test_facts_of_a_listed_model_are_those_of_open_clips_list() -> None:
    entry = openclip_entry(Asked(name="openclip:ViT-B-32.laion2b_s34b_b79k"))
    assert entry.hub_id == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert entry.size_px == (224, 224)
    assert entry.tokens == {"cls": 512}
    assert entry.mean == open_clip.OPENAI_DATASET_MEAN
    assert entry.sd == open_clip.OPENAI_DATASET_STD
    assert entry.interpolation == "bicubic"
    # Counted by open_clip: 151,277,313 with the text tower.
    assert entry.parameters == 87_849_216


def test_a_siglip_has_its_own_mean_and_a_bare_architecture_no_repository() -> None:
    entry = openclip_entry(Asked(name="openclip:ViT-B-16-SigLIP.webli"))
    assert entry.mean == entry.sd == (0.5, 0.5, 0.5)
    assert entry.tokens == {"cls": 768}
    bare = openclip_entry(Asked(name="openclip:ViT-B-16-SigLIP"))
    assert bare.hub_id is None
    assert bare.mean == open_clip.OPENAI_DATASET_MEAN


def test_the_activation_is_that_of_the_tag() -> None:
    """OpenAI's weights were trained with a sigmoid in place of the error function."""
    from ctfm.extract.openclip_models import _about

    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        about = _about(Asked(name=f"openclip:ViT-B-32.{tag}"))
        assert bool(about.config["quick_gelu"]) is quick


def test_weights_of_ones_own_load_with_or_without_the_prefix_of_parallel_training(
    tmp_path: Path,
) -> None:
    saved(VIT, tmp_path)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    of_hub = get_backbone(f"openclip:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").unlink()
    wrapped = {"state_dict": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    assert get_backbone(f"openclip:{tmp_path}").digest == of_hub.digest


def test_of_several_files_the_one_is_taken_that_open_clip_takes(tmp_path: Path) -> None:
    model = saved(VIT, tmp_path)
    plain = {n: t.clone() for n, t in model.state_dict().items()}
    names = (
        *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
        *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    )
    for number, name in enumerate(names):
        tensors = {n: t + number for n, t in plain.items()}
        if name.endswith("safetensors"):
            save_file(tensors, tmp_path / name)
        else:
            torch.save(tensors, tmp_path / name)
    for number, name in enumerate(names):
        assert Path(open_clip.factory._find_checkpoint_in_dir(tmp_path)).name == name
        held = get_backbone(f"openclip:{tmp_path}").module.state_dict()
        assert_close(held["visual.proj"], plain["visual.proj"] + number)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_loads_completely_or_not_at_all(tmp_path: Path, fault: str) -> None:
    saved(VIT, tmp_path)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    name = "visual.transformer.resblocks.1.ln_1.weight"
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name.replace("1.ln", "2.ln")] = torch.ones(24)
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(BackboneError, match=rf"1 {fault} \(transformer\.resblocks"):
        get_backbone(f"openclip:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33", r"no architecture 'ViT-B-33': did you mean .*ViT-B-32"),
        ("ViT-B-32.laion2b", "no tag of ViT-B-32 'laion2b'"),
    ],
)
def test_an_unknown_model_is_an_error_with_near_names(name: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        get_backbone(f"openclip:{name}")


def test_an_architecture_alone_needs_weights() -> None:
    with pytest.raises(BackboneError, match="has no repository: pass `--weights FILE`"):
        get_backbone("openclip:ViT-B-32")


def test_without_open_clip_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(BackboneError, match=r"pip install 'ctfm\[openclip\]'"):
        get_backbone("openclip:ViT-B-32")
