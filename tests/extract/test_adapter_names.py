"""Adapters as people have them: of other versions, under other names, of more than the tower."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_folders import write_processor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctfm.extract.adapter_config import scale_of
from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.extract.lora import merge_adapter
from ctfm.store.errors import BackboneError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

RANK, ALPHA = 3, 5
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 16,
}


def write_model(model: str, folder: Path) -> Any:
    """A small random model of transformers, in a folder that `hf:` takes."""
    import transformers

    torch.manual_seed(0)
    config_class = getattr(transformers, f"{model}Config")
    sizes = (
        VIT
        if model != "Swin"
        else {
            **{"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
            **{"image_size": 32, "patch_size": 8},
        }
    )
    built = getattr(transformers, f"{model}Model")(config_class(**sizes)).eval()
    built.save_pretrained(folder)
    write_processor(folder, size_px=32, do_center_crop=False)
    return built


def load(folder: Path) -> Backbone:
    return get_backbone(f"hf:{folder}")


def write_pairs(
    shapes: Mapping[str, tuple[int, ...]], folder: Path, **settings: Any
) -> dict[str, Tensor]:
    """An adapter with random pairs for modules of these names and shapes; what each is to add."""
    generator = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for name, (rows, columns) in shapes.items():
        down = torch.randn(RANK, columns, generator=generator)
        up = 0.1 * torch.randn(rows, RANK, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        deltas[name] = ALPHA / RANK * up @ down
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def weights_of(backbone: Backbone) -> dict[str, Tensor]:
    return {n.removeprefix("model."): t.clone() for n, t in backbone.module.state_dict().items()}


Small = Callable[[str], Backbone]


@pytest.fixture
def small(small_backbones: Any, tmp_path: Path) -> Small:
    def load_anew(name: str) -> Backbone:
        folder = tmp_path / name.replace("/", "-").replace(":", "-")
        if not folder.exists():
            small_backbones.write(name, folder)
        backbone: Backbone = small_backbones.load(name, folder)
        return backbone

    return load_anew


OLD_VIT = {
    "encoder.layer.{n}.attention.attention.query": "layers.{n}.attention.q_proj",
    "encoder.layer.{n}.attention.attention.key": "layers.{n}.attention.k_proj",
    "encoder.layer.{n}.attention.attention.value": "layers.{n}.attention.v_proj",
    "encoder.layer.{n}.attention.output.dense": "layers.{n}.attention.o_proj",
    "encoder.layer.{n}.intermediate.dense": "layers.{n}.mlp.fc1",
    "encoder.layer.{n}.output.dense": "layers.{n}.mlp.fc2",
}
OLD_DINOV2 = {
    "encoder.layer.{n}.attention.attention.query": "encoder.layer.{n}.attention.q_proj",
    "encoder.layer.{n}.attention.attention.value": "encoder.layer.{n}.attention.v_proj",
    "encoder.layer.{n}.attention.output.dense": "encoder.layer.{n}.attention.o_proj",
    "encoder.layer.{n}.mlp.fc1": "encoder.layer.{n}.mlp.fc1",
}
_BLOCK = "encoder.layers.{n}.blocks.0."
OLD_SWIN = {
    f"{_BLOCK}attention.self.query": f"{_BLOCK}attention.q_proj",
    f"{_BLOCK}attention.output.dense": f"{_BLOCK}attention.o_proj",
    f"{_BLOCK}intermediate.dense": f"{_BLOCK}mlp.fc1",
    f"{_BLOCK}output.dense": f"{_BLOCK}mlp.fc2",
}


@pytest.mark.parametrize(
    ("model", "names", "start"),
    [
        ("ViT", OLD_VIT, ""),
        ("ViT", OLD_VIT, "vit."),
        ("ViT", OLD_VIT, "model.backbone."),
        ("DeiT", OLD_VIT, "deit."),
        ("Beit", OLD_VIT, "beit."),
        ("Dinov2", OLD_DINOV2, ""),
        ("Dinov2", OLD_DINOV2, "dinov2."),
        ("Swin", OLD_SWIN, "swin."),
    ],
)
def test_names_of_transformers_4_find_the_modules_of_5(
    tmp_path: Path, model: str, names: dict[str, str], start: str
) -> None:
    write_model(model, tmp_path / "base")
    before = weights_of(load(tmp_path / "base"))
    new_of = {
        start + old.format(n=n): new.format(n=n) for old, new in names.items() for n in range(2)
    }
    shapes = {old: tuple(before[f"{new}.weight"].shape) for old, new in new_of.items()}
    deltas = write_pairs(shapes, tmp_path / "adapter")
    merged = merge_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    after = weights_of(merged)
    for old, new in new_of.items():
        change = after.pop(f"{new}.weight") - before[f"{new}.weight"]
        torch.testing.assert_close(change, deltas[old], rtol=0, atol=1e-6)
    assert all(torch.equal(after[name], before[name]) for name in after)
    outer = "backbone." if start == "model.backbone." else start
    assert merged.remarks == ((f"cut off the adapter's names: {outer}",) if start else ())


def save_peft(model: Any, folder: Path, **settings: Any) -> Any:
    """A model with PEFT's own branches of random weights, which it saved."""
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **settings})
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


class Classifier(nn.Module):
    """A backbone under a name, and a layer on top."""

    def __init__(self, backbone: nn.Module, name: str, head: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, backbone)
        setattr(self, head, nn.Linear(24, 5))

    def forward(self, pixel_values: Tensor) -> Any:
        return getattr(self, self.name)(pixel_values)


def check_as_peft(carried: Any, merged: Backbone) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        hidden = carried(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(merged.module(pixels)["cls"], hidden[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "head"),
    [("vit", "classifier"), ("backbone", "head"), ("encoder", "fc"), ("net", "linear")],
)
def test_an_adapter_of_a_classifier_gives_what_peft_gives(
    tmp_path: Path, name: str, head: str
) -> None:
    model = write_model("ViT", tmp_path / "base")
    targets = rf".*q_proj|.*mlp\.fc1|{head}"
    carried = save_peft(Classifier(model, name, head), tmp_path / "adapter", target_modules=targets)
    merged = merge_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    check_as_peft(carried, merged)
    assert merged.remarks == (
        f"cut off the adapter's names: {name}.",
        f"left out of the adapter: {head}",
    )


@pytest.mark.parametrize("listed", [["classifier"], ["classifier", "score"]])
def test_a_classifier_that_was_trained_whole_is_left_out_and_said(
    tmp_path: Path, listed: list[str]
) -> None:
    """As PEFT's own example of image classification does it."""
    model = write_model("ViT", tmp_path / "base")
    wrapped = Classifier(model, "vit", "classifier")
    settings = {"target_modules": ["q_proj"], "modules_to_save": listed}
    carried = save_peft(wrapped, tmp_path / "adapter", **settings)
    merged = merge_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    check_as_peft(carried, merged)
    assert "left out of the adapter: classifier.bias, classifier.weight" in merged.remarks


@pytest.mark.parametrize(
    ("backbone", "name", "listed"),
    [
        ("hf:org/vit", "layernorm.weight", ["layernorm"]),
        ("hf:org/vit", "vit.layernorm.weight", ["layernorm"]),
        ("hf:org/vit", "vit.embeddings.cls_token", ["embeddings"]),
        ("hf:org/vit", None, ["layernorm"]),
        ("medsiglip", "vision_model.head.probe", ["head"]),
        ("medsiglip", "head.probe", ["head"]),
        ("dinov3-base", "norm.weight", ["classifier", "norm"]),
        ("dinov3-base", "model.norm.weight", ["norm"]),
        ("timm:test_vit", "norm.weight", ["norm"]),
    ],
)
def test_a_part_of_the_tower_that_was_trained_whole_is_refused_by_name(
    tmp_path: Path, small: Small, backbone: str, name: str | None, listed: list[str]
) -> None:
    pair = {
        "hf:org/vit": "layers.0.attention.q_proj",
        "medsiglip": "encoder.layers.0.self_attn.q_proj",
        "dinov3-base": "layer.0.attention.q_proj",
        "timm:test_vit": "blocks.0.attn.proj",
    }[backbone]
    write_pairs({pair: (24, 24)}, tmp_path / "adapter", modules_to_save=listed)
    file = tmp_path / "adapter/adapter_model.safetensors"
    whole = {} if name is None else {f"base_model.model.{name}": torch.ones(24)}
    save_file(load_file(file) | whole, file)
    with pytest.raises(BackboneError, match=r"modules_to_save.*merge_and_unload"):
        merge_adapter(small(backbone), tmp_path / "adapter")


@pytest.mark.parametrize("below", ["checkpoint-10", "default"])
def test_an_adapter_in_a_folder_below_is_pointed_at(
    tmp_path: Path, small: Small, below: str
) -> None:
    write_pairs({"layers.0.attention.q_proj": (24, 24)}, tmp_path / "adapter")
    (tmp_path / "run").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "run" / below)
    backbone = small("hf:org/vit")
    with pytest.raises(BackboneError, match=f"one in {below}: pass that folder"):
        merge_adapter(backbone, tmp_path / "run")
    with pytest.raises(BackboneError, match="the folder, not the file"):
        merge_adapter(backbone, tmp_path / "run" / below / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("key", "matches"),
    [
        ("^layers.0.attention.q_proj", False),
        ("^vit.layers.0.attention.q_proj", True),
        ("layers.0.attention.q_proj", True),
        ("0.attention.q_proj", True),
        ("ayers.0.attention.q_proj", False),
        (r"layers\.\d\.attention\.q_proj", True),
        ("layers.0.attention", False),
        ("layers.9.attention.q_proj|layers.0.attention.q_proj", True),
    ],
)
def test_a_pattern_of_alpha_means_what_it_means_to_peft(key: str, matches: bool) -> None:
    from peft.utils.other import get_pattern_key

    name = "vit.layers.0.attention.q_proj"
    assert (get_pattern_key([key], name) == key) == matches
    scale = scale_of({"lora_alpha": ALPHA, "alpha_pattern": {key: 50}}, name)
    assert scale(2) == (50 if matches else ALPHA) / 2


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
def test_a_pattern_that_begins_with_the_start_of_the_name_gives_what_peft_gives(
    tmp_path: Path,
) -> None:
    """`^` is not before `layers`: what was trained has the name `vit.layers`."""
    model = write_model("ViT", tmp_path / "base")
    patterns: dict[str, Any] = {
        "alpha_pattern": {"^layers.0.attention.q_proj": 50, "^vit.layers.1.attention.q_proj": 20},
        "rank_pattern": {"layers.0.attention.q_proj": 2},
    }
    wrapped = Classifier(model, "vit", "classifier")
    carried = save_peft(wrapped, tmp_path / "adapter", target_modules=["q_proj"], **patterns)
    check_as_peft(carried, merge_adapter(load(tmp_path / "base"), tmp_path / "adapter"))


def shapes_of(backbone: Backbone, modules: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in weights_of(backbone).items()
        if re.fullmatch(rf"{modules}\.weight", name)
    }


@pytest.mark.parametrize(
    ("backbone", "modules", "tower", "others"),
    [
        (
            "medsiglip",
            r"encoder\..*[qv]_proj",
            "vision_model.",
            ["text_model.encoder.layers.0.self_attn.q_proj"],
        ),
        (
            "medgemma",
            r"encoder\..*[qv]_proj",
            "model.vision_tower.vision_model.",
            [
                "model.language_model.layers.0.self_attn.q_proj",
                "model.multi_modal_projector.linear",
            ],
        ),
        ("medgemma", r"encoder\..*[qv]_proj", "vision_tower.", ["lm_head"]),
        ("openclip:one", r"visual\.transformer\..*c_fc", "", ["transformer.resblocks.0.mlp.c_fc"]),
        ("hf:org/vit", r".*q_proj", "", ["decoder.layers.0.self_attn.q_proj", "classifier"]),
        ("hf:org/vit", r".*q_proj", "encoder.", ["text_decoder.layers.0.self_attn.q_proj"]),
        ("hf:org/vit", r".*q_proj", "backbone.", ["head.0", "head.3"]),
    ],
)
def test_pairs_outside_the_image_tower_are_left_out_and_said(
    tmp_path: Path, small: Small, backbone: str, modules: str, tower: str, others: list[str]
) -> None:
    shapes = shapes_of(small(backbone), modules)
    inside = {tower + name: shape for name, shape in shapes.items()}
    assert inside
    write_pairs(inside, tmp_path / "alone")
    write_pairs(inside | dict.fromkeys(others, (24, 24)), tmp_path / "more")
    alone = merge_adapter(small(backbone), tmp_path / "alone")
    more = merge_adapter(small(backbone), tmp_path / "more")
    after, expected = weights_of(more), weights_of(alone)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert f"left out of the adapter: {', '.join(sorted(others))}" in more.remarks
    assert more.settings() != alone.settings()  # another adapter is another store


@pytest.mark.parametrize(
    ("backbone", "names", "says"),
    [
        (
            "medsiglip",
            ["text_model.encoder.layers.0.self_attn.q_proj"],
            "nothing of an image's embedding",
        ),
        ("hf:org/vit", ["classifier"], "nothing of an image's embedding"),
        (
            "hf:org/vit",
            ["student.layers.0.attention.q_proj", "teacher.layers.0.attention.q_proj"],
            r"in several places \(student\., teacher\.\)",
        ),
        ("hf:org/vit", ["layers.0.attention.q_proj", "layers.7.attention.q_proj"], "more layers"),
        (
            "hf:org/vit",
            ["vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"],
            "changes one module by",
        ),
        # DINOv2's own names, and not DINOv3's in an encoder: sizes would not tell.
        ("dinov3-base", ["encoder.layer.0.attention.q_proj"], "another network of this library"),
        (
            "dinov3-base",
            ["encoder.layer.0.attention.attention.query"],
            r"made for names of transformers 4 \(attention.query\)",
        ),
        ("dinov3-base", ["layers.0.attention.q_proj"], "another network of this library"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_its_cause(
    tmp_path: Path, small: Small, backbone: str, names: list[str], says: str
) -> None:
    write_pairs(dict.fromkeys(names, (24, 24)), tmp_path / "adapter")
    with pytest.raises(BackboneError, match=says):
        merge_adapter(small(backbone), tmp_path / "adapter")


def test_an_adapter_that_says_it_is_of_another_network_is_refused(tmp_path: Path) -> None:
    """ViT, DeiT and BEiT name their modules alike."""
    write_model("Beit", tmp_path / "beit")
    vit = write_model("ViT", tmp_path / "vit")
    save_peft(vit, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(BackboneError, match=r"trained on ViTModel of transformers.*is beit"):
        merge_adapter(load(tmp_path / "beit"), tmp_path / "adapter")
    merge_adapter(load(tmp_path / "vit"), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"samples": 4}),
        ("velora_config", {"num_groups": 8}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("use_qalora", True),
        ("use_something_of_next_year", True),
        ("something_config", {"a": 0}),
    ],
)
def test_a_kind_of_lora_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, small: Small, setting: str, value: object
) -> None:
    names = {"layers.0.attention.q_proj": (24, 24)}
    write_pairs(names, tmp_path / "adapter", **{setting: value})
    with pytest.raises(BackboneError, match=rf"trained with {setting}.*merge_and_unload"):
        merge_adapter(small("hf:org/vit"), tmp_path / "adapter")


def test_every_setting_of_peft_is_either_understood_or_refused(
    tmp_path: Path, small: Small
) -> None:
    """The defaults of this PEFT, all of them, are a plain LoRA."""
    config = {**peft.LoraConfig().to_dict(), "peft_type": "LORA"}
    settings = {name: value for name, value in config.items() if name not in ("r", "lora_alpha")}
    names = {"layers.0.attention.q_proj": (24, 24)}
    write_pairs(names, tmp_path / "adapter", **settings, of_next_year=16, more_of_it=None)
    merged = merge_adapter(small("hf:org/vit"), tmp_path / "adapter")
    assert merged.adapter is not None
    assert math.isfinite(merged.adapter.max_relative_error)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[1]", "no configuration of PEFT"),
        ('{"peft_type": "LORA", "alpha_pattern": {"(": 2}}', "no regular expression"),
    ],
)
def test_a_configuration_that_is_none_is_said_so(
    tmp_path: Path, small: Small, config: str, says: str
) -> None:
    write_pairs({"layers.0.attention.q_proj": (24, 24)}, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(config)
    with pytest.raises(BackboneError, match=says):
        merge_adapter(small("hf:org/vit"), tmp_path / "adapter")
