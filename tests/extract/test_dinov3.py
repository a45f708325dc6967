"""DINOv3 against transformers' own output and timm's, on small random checkpoints."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from ctfm.extract.backbone import Backbone, BackboneEntry, load_backbone
from ctfm.extract.dinov3 import ENTRIES, Sizes, tower
from ctfm.store.errors import BackboneError

D, LAYERS, HEADS, REGISTERS = 48, 3, 4, 4
S, SIZE_PX = 2, 64
TINY = {
    "hidden_size": D,
    "intermediate_size": 4 * D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_register_tokens": REGISTERS,
}
WINDOWS = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))


@pytest.fixture
def entry() -> BackboneEntry:
    return replace(
        ENTRIES[0],
        name="dinov3-tiny",
        tokens={"cls": D, "mean": D},
        size_px=(SIZE_PX, SIZE_PX),
        load=tower(TINY).load,
    )


def shaken(model: Any) -> Any:
    """Every parameter random, so that none (mask token, layer scale, biases) is a special case."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def reference() -> Any:
    return shaken(DINOv3ViTModel(DINOv3ViTConfig(**TINY)))


@pytest.fixture
def hub_tensors(reference: Any) -> dict[str, Tensor]:
    """The names of the files on the hub, written down independently of any library's rename."""
    return {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in reference.state_dict().items()
    }


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(S, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(2))


def outputs(backbone: Backbone, pixels: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        return dict(backbone.module(pixels))


def check_equal_to(reference: Any, backbone: Backbone, pixels: Tensor) -> None:
    with torch.inference_mode():
        expected = reference(pixel_values=pixels)
    got = outputs(backbone, pixels)
    assert_close(got["cls"], expected.pooler_output, rtol=0, atol=1e-6)
    patches = expected.last_hidden_state[:, 1 + REGISTERS :]
    assert patches.shape[1] == (SIZE_PX // 16) ** 2
    assert_close(got["mean"], patches.mean(dim=1), rtol=0, atol=1e-6)


def test_a_folder_of_the_genuine_layout_gives_transformers_output(
    tmp_path: Path,
    entry: BackboneEntry,
    hub_tensors: dict[str, Tensor],
    pixels: Tensor,
    reference: Any,
) -> None:
    assert "layer.0.attention.q_proj.weight" in hub_tensors
    assert "layer.0.attention.k_proj.bias" not in hub_tensors
    save_file(hub_tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    check_equal_to(reference, load_backbone(entry, tmp_path), pixels)


def test_a_folder_that_transformers_saved_gives_transformers_output(
    tmp_path: Path, entry: BackboneEntry, pixels: Tensor, reference: Any
) -> None:
    reference.save_pretrained(tmp_path)
    check_equal_to(reference, load_backbone(entry, tmp_path), pixels)


def test_a_file_of_the_layout_in_memory_gives_the_same_and_has_the_same_digest(
    tmp_path: Path,
    entry: BackboneEntry,
    hub_tensors: dict[str, Tensor],
    pixels: Tensor,
    reference: Any,
) -> None:
    of_hub, in_memory = tmp_path / "hub.safetensors", tmp_path / "memory.safetensors"
    save_file(hub_tensors, of_hub)
    save_file(
        {f"model.{n}" if n.startswith("layer.") else n: t for n, t in hub_tensors.items()},
        in_memory,
    )
    backbone = load_backbone(entry, in_memory)
    check_equal_to(reference, backbone, pixels)
    assert backbone.digest == load_backbone(entry, of_hub).digest


@pytest.mark.parametrize("variant", ["vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"])
def test_a_file_in_timms_layout_gives_timms_output(
    tmp_path: Path, entry: BackboneEntry, pixels: Tensor, variant: str
) -> None:
    model = shaken(
        timm.create_model(
            variant, depth=LAYERS, embed_dim=D, num_heads=HEADS, num_classes=0, global_pool="token"
        )
    )
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    got = outputs(load_backbone(entry, tmp_path), pixels)
    with torch.inference_mode():
        expected = model.forward_features(pixels)
    assert_close(got["cls"], expected[:, 0], rtol=0, atol=1e-6)
    assert_close(got["mean"], expected[:, 1 + REGISTERS :].mean(dim=1), rtol=0, atol=1e-6)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def plus(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("layer.1.mlp.up_proj.bias"), r"1 missing \(layer.1.mlp.up_proj.bias\)"),
        (without("embeddings.mask_token"), r"1 missing \(embeddings.mask_token\)"),
        (plus("layer.3.norm1.weight"), r"1 unexpected \(layer.3.norm1.weight\)"),
        (plus("layer.0.attention.k_proj.bias"), r"1 unexpected \(layer.0.attention.k_proj.bias\)"),
        (plus("norm.weight"), r"1 of another shape \(norm.weight\)"),
    ],
)
def test_an_incomplete_or_foreign_checkpoint_is_an_error_that_names_the_tensor(
    tmp_path: Path,
    entry: BackboneEntry,
    hub_tensors: dict[str, Tensor],
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    damage(hub_tensors)
    save_file(hub_tensors, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(entry, tmp_path)
    assert "as dinov3-tiny" in str(caught.value)


def test_a_timm_file_that_lacks_a_tensor_is_an_error(tmp_path: Path, entry: BackboneEntry) -> None:
    model = timm.create_model(
        "vit_small_patch16_dinov3_qkvb", depth=LAYERS, embed_dim=D, num_heads=HEADS, num_classes=0
    )
    tensors = model.state_dict()
    del tensors["blocks.1.attn.qkv.weight"]
    save_file(tensors, tmp_path / "timm.safetensors")
    with pytest.raises(BackboneError, match=r"missing \(layer.1.attention.k_proj.weight"):
        load_backbone(entry, tmp_path)


def test_embedding_is_resize_normalise_and_forward(
    tmp_path: Path, entry: BackboneEntry, reference: Any
) -> None:
    reference.save_pretrained(tmp_path)
    backbone = load_backbone(entry, tmp_path, tokens=["mean", "cls"])
    hu = torch.randint(-1024, 2000, (S, 37, 41), dtype=torch.int16)
    channels = backbone.channels(hu, WINDOWS)
    resized = torch.nn.functional.interpolate(
        channels, size=(SIZE_PX, SIZE_PX), mode="bilinear", antialias=True
    )
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    sd = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        expected = reference(pixel_values=(resized - mean) / sd).pooler_output
    embedded = backbone.embed(channels)
    assert list(embedded) == ["mean", "cls"]
    assert embedded["cls"].shape == (S, D)
    assert_close(embedded["cls"], expected, rtol=0, atol=1e-6)


def test_bfloat16_equals_transformers_own_bfloat16(
    tmp_path: Path, entry: BackboneEntry, reference: Any, pixels: Tensor
) -> None:
    reference.save_pretrained(tmp_path)
    half = DINOv3ViTModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    backbone = load_backbone(entry, tmp_path).to("cpu", "bfloat16")
    with torch.inference_mode():
        expected = half(pixel_values=pixels.bfloat16()).pooler_output
    assert torch.equal(outputs(backbone, pixels.bfloat16())["cls"], expected)
    embedded = backbone.embed(torch.rand(S, 3, SIZE_PX, SIZE_PX))
    assert embedded["cls"].dtype == torch.float32


def test_nothing_is_left_on_the_meta_device(
    tmp_path: Path, entry: BackboneEntry, reference: Any
) -> None:
    reference.save_pretrained(tmp_path)
    module = load_backbone(entry, tmp_path).module
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_changing_the_file_later_does_not_change_the_backbone(
    tmp_path: Path, entry: BackboneEntry, reference: Any, pixels: Tensor
) -> None:
    file = tmp_path / "model.safetensors"
    reference.save_pretrained(tmp_path)
    backbone = load_backbone(entry, file)
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(1000))
    assert load_file(file).keys()
    check_equal_to(reference, backbone, pixels)


GATED: dict[str, bool | str] = {"use_gated_mlp": True, "hidden_act": "silu"}


@pytest.mark.parametrize("biased", [True, False])
def test_a_gated_mlp_in_the_genuine_layout_gives_transformers_output(
    tmp_path: Path, entry: BackboneEntry, pixels: Tensor, biased: bool
) -> None:
    """Biased as S+ and H+ are, without biases of q and v as 7B is."""
    sizes: Sizes = {**TINY, **GATED, "query_bias": biased, "value_bias": biased}
    gated = shaken(DINOv3ViTModel(DINOv3ViTConfig(**sizes)))
    gated.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "layer.0.mlp.gate_proj.weight" in saved
    assert ("layer.0.attention.q_proj.bias" in saved) == biased
    backbone = load_backbone(replace(entry, load=tower(sizes).load), tmp_path)
    check_equal_to(gated, backbone, pixels)


@pytest.mark.parametrize("entry", [ENTRIES[1], ENTRIES[4], ENTRIES[5]], ids=lambda one: one.name)
def test_the_gated_sizes_are_those_that_were_compared(entry: BackboneEntry) -> None:
    assert entry.skeleton is not None
    skeleton: Any = entry.skeleton()
    config = skeleton.model.config
    assert (config.use_gated_mlp, config.hidden_act) == (True, "silu")
    assert config.query_bias == config.value_bias == (entry.name != "dinov3-7b")


@pytest.mark.parametrize("biased", [True, False])
def test_a_gated_mlp_in_timms_layout_gives_timms_output(
    tmp_path: Path, entry: BackboneEntry, pixels: Tensor, biased: bool
) -> None:
    variant = "vit_small_plus_patch16_dinov3" + ("_qkvb" if biased else "")
    size = {"depth": LAYERS, "embed_dim": D, "num_heads": HEADS}
    model = shaken(timm.create_model(variant, num_classes=0, global_pool="token", **size))
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    sizes: Sizes = {**TINY, **GATED, "query_bias": biased, "value_bias": biased}
    backbone = load_backbone(replace(entry, load=tower(sizes).load), tmp_path / "timm.safetensors")
    got = outputs(backbone, pixels)
    with torch.inference_mode():
        expected = model.forward_features(pixels)
    assert_close(got["cls"], expected[:, 0], rtol=0, atol=1e-6)
    assert_close(got["mean"], expected[:, 1 + REGISTERS :].mean(dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("entry", "parameters", "d"),
    [
        (ENTRIES[0], 21_596_544, 384),
        (ENTRIES[1], 28_692_864, 384),
        (ENTRIES[2], 85_660_416, 768),
        (ENTRIES[3], 303_129_600, 1024),
        (ENTRIES[4], 840_592_640, 1280),
        (ENTRIES[5], 6_716_035_072, 4096),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneEntry) else None,
)
def test_the_full_size_has_the_stated_parameters_and_output(
    entry: BackboneEntry, parameters: int, d: int
) -> None:
    assert entry.skeleton is not None
    module = entry.skeleton().to("meta").eval()
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == entry.parameters == parameters
    with torch.inference_mode():
        tokens = module(torch.empty(S, 3, SIZE_PX, SIZE_PX, device="meta"))
    assert {name: values.shape for name, values in tokens.items()} == {
        "cls": (S, d),
        "mean": (S, d),
    }
    assert entry.tokens == {"cls": d, "mean": d}


@pytest.mark.parametrize(
    ("layout", "a_layer", "others"),
    [
        ("hf", 4, ("patch_embeddings", "up_proj", "down_proj")),
        ("timm", 2, ("patch_embed.proj", "fc1", "fc2")),
    ],
)
def test_lora_targets_are_the_attention_projections_and_nothing_else(
    layout: str, a_layer: int, others: tuple[str, ...]
) -> None:
    model = (
        DINOv3ViTModel(DINOv3ViTConfig(**TINY))
        if layout == "hf"
        else timm.create_model(
            "vit_small_patch16_dinov3_qkvb", depth=LAYERS, embed_dim=D, num_heads=HEADS
        )
    )
    names = [name for name, _ in model.named_modules()]
    hit = [name for name in names if re.fullmatch(ENTRIES[0].lora_targets[layout], name)]
    assert len(hit) == a_layer * LAYERS
    assert all(any(name.endswith(other) for name in names) for other in others)
    assert not any(name.endswith(others) for name in hit)
