"""LoRA: merged as PEFT applies it, in every layout; wrong adapters are refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from ctfm.extract.backbone import Backbone
from ctfm.extract.lora import merge_adapter
from ctfm.store.errors import BackboneError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

DINOV3 = r".*layer\.\d+\.attention\.[qkvo]_proj"
SIGLIP = r".*encoder\.layers\.\d+\.self_attn\.(?:[qkv]|out)_proj"
TIMM = r"blocks\.\d+\.attn\.(?:qkv|proj)"

CASES: dict[str, tuple[str, str]] = {
    "dinov3-base": (DINOV3, "embeddings.patch_embeddings"),
    "dinov3-small-plus": (DINOV3, "embeddings.patch_embeddings"),
    "dinov3-7b": (DINOV3, "embeddings.patch_embeddings"),
    "medgemma": (SIGLIP, "embeddings.patch_embedding"),
    "medsiglip": (SIGLIP, "embeddings.patch_embedding"),
    "medimageinsight": (r".*_attn\.(?:qkv|proj)", "convs.0.conv"),
    "hf:org/vit": (r".*attention\.[qkvo]_proj", "embeddings.patch_embeddings.projection"),
    "timm:test_vit": (TIMM, "patch_embed.proj"),  # a class token, as DINOv2 has
    "timm:test_vit4": (TIMM, "patch_embed.proj"),  # pooled by attention, as SigLIP is
    "timm:vit_small_patch16_dinov3": (TIMM, "patch_embed.proj"),
}
"""Attention projections and patch embedding of every 2-D backbone, in transformers and in timm."""

Load = Callable[[str], Backbone]


@pytest.fixture
def load(small_backbones: Any, tmp_path: Path) -> Load:
    """A small backbone, loaded anew from the same checkpoint each time."""

    def load_anew(name: str) -> Backbone:
        folder = tmp_path / name.replace("/", "-")
        if not folder.exists():
            small_backbones.write(name, folder)
        backbone: Backbone = small_backbones.load(name, folder)
        return backbone

    return load_anew


def write_adapter(model: Any, targets: str, folder: Path, **settings: Any) -> Any:
    """A PEFT adapter with random weights, written by PEFT; the model that carries it."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets, **settings})
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


def tokens_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    assert backbone.entry.size_px is not None
    channels = torch.rand(3, 3, *backbone.entry.size_px, generator=torch.Generator().manual_seed(9))
    return backbone.embed(channels)


@pytest.mark.parametrize("name", CASES)
def test_gives_the_tokens_that_peft_gives(name: str, load: Load, tmp_path: Path) -> None:
    check_merge(name, load, tmp_path / "adapter")


@pytest.mark.parametrize("scaling", [{"use_rslora": True}, {"alpha_pattern": {".*proj": 7}}])
@pytest.mark.parametrize("name", ["dinov3-base", "medimageinsight", "timm:test_vit"])
def test_scales_as_peft_does(
    name: str, scaling: dict[str, Any], load: Load, tmp_path: Path
) -> None:
    check_merge(name, load, tmp_path / "adapter", **scaling)


def check_merge(name: str, load: Load, adapter: Path, **scaling: Any) -> None:
    attention, patches = CASES[name]
    carried = load(name)
    targets = rf"(?:{attention}|(?:.*\.)?{re.escape(patches)})"
    write_adapter(carried.module.model, targets, adapter, **scaling)
    expected = tokens_of(carried)  # PEFT put its branches into the module
    plain = tokens_of(load(name))
    merged = merge_adapter(load(name), adapter)
    for token, rows in tokens_of(merged).items():
        torch.testing.assert_close(rows, expected[token], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rows, plain[token], rtol=1e-2, atol=1e-2)
    assert merged.adapter is not None
    assert merged.adapter.max_relative_error < 1e-5


@pytest.fixture
def adapter(load: Load, tmp_path: Path) -> Path:
    """An adapter of the small DINOv3, in transformers' layout."""
    write_adapter(load("dinov3-base").module.model, DINOV3, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_is_merged_in_float32_and_rounded_once(adapter: Path, load: Load) -> None:
    """A small update of a large weight is lost where it is added in bfloat16."""
    merged = merge_adapter(load("dinov3-base"), adapter)
    assert {p.dtype for p in merged.module.parameters()} == {torch.float32}
    name = "model.model.layer.0.attention.q_proj.weight"
    pair = load_file(adapter / "adapter_model.safetensors")
    down, up = (
        next(t for n, t in pair.items() if f"layer.0.attention.q_proj.lora_{part}" in n)
        for part in "AB"
    )
    expected = load("dinov3-base").module.state_dict()[name] + 5 / 3 * (up @ down)
    torch.testing.assert_close(merged.module.state_dict()[name], expected)
    half = merged.to("cpu", "bfloat16")
    assert torch.equal(half.module.state_dict()[name], expected.bfloat16())
    with pytest.raises(ConfigError, match="in float32 to be merged"):
        merge_adapter(load("dinov3-base").to("cpu", "bfloat16"), adapter)


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def test_names_of_another_version_of_transformers_are_understood(adapter: Path, load: Load) -> None:
    merged = merge_adapter(load("dinov3-base"), adapter)
    rename(adapter, lambda name: name.replace(".model.model.layer.", ".model.layer."))
    other = merge_adapter(load("dinov3-base"), adapter)
    assert torch.equal(tokens_of(merged)["cls"], tokens_of(other)["cls"])


def test_names_of_the_released_modules_are_understood(load: Load, tmp_path: Path) -> None:
    """Who trains on MedImageInsight's own code gets its names, and so does the patch embedding."""
    folder = tmp_path / "adapter"
    targets = r"(?:.*_attn\.(?:qkv|proj)|.*convs\.0\.conv)"
    write_adapter(load("medimageinsight").module.model, targets, folder)
    merged = merge_adapter(load("medimageinsight"), folder)

    def released(name: str) -> str:
        name = name.replace("_attn.", "_attn.fn.").replace("convs.0.conv.", "convs.0.proj.")
        return name.replace("base_model.model.", "base_model.model.image_encoder.")

    rename(folder, released)
    assert any("image_encoder.blocks" in n for n in load_file(folder / "adapter_model.safetensors"))
    other = merge_adapter(load("medimageinsight"), folder)
    assert torch.equal(tokens_of(merged)["cls"], tokens_of(other)["cls"])


LAYOUTS = {
    "dinov3-base": "transformers' names",
    "medsiglip": "transformers' names",
    "timm:test_vit": "timm's names",
    "timm:test_vit4": "timm's names",
    "medimageinsight": "DaViT's names",
}


@pytest.mark.parametrize(
    ("trained_on", "onto"),
    [
        ("dinov3-base", "timm:test_vit"),
        ("dinov3-base", "medimageinsight"),
        ("dinov3-base", "medgemma"),
        ("medsiglip", "timm:test_vit4"),
        ("timm:test_vit", "dinov3-base"),
        ("timm:test_vit4", "medsiglip"),
        ("timm:test_vit", "medimageinsight"),
        ("medimageinsight", "dinov3-base"),
    ],
)
def test_an_adapter_of_another_layout_is_refused_naming_both(
    trained_on: str, onto: str, load: Load, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    write_adapter(load(trained_on).module.model, CASES[trained_on][0], folder)
    with pytest.raises(BackboneError) as caught:
        merge_adapter(load(onto), folder)
    message = str(caught.value)
    assert f"was made for {LAYOUTS[trained_on]}" in message
    assert f"are not in {onto}, which has" in message


def test_an_adapter_that_lacks_half_a_pair_is_refused(adapter: Path, load: Load) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, file)
    with pytest.raises(BackboneError, match="without a pair"):
        merge_adapter(load("dinov3-base"), adapter)


def test_an_adapter_of_another_width_is_refused(adapter: Path, load: Load) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name: tensor[:, :-1].contiguous() if "lora_A" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    with pytest.raises(BackboneError, match="do not fit"):
        merge_adapter(load("dinov3-base"), adapter)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["norm"]),
        ("alora_invocation_tokens", [1]),
        ("peft_type", "IA3"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    adapter: Path, load: Load, setting: str, value: Any
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    with pytest.raises(BackboneError, match=setting if setting != "peft_type" else "IA3"):
        merge_adapter(load("dinov3-base"), adapter)


def test_a_pickled_adapter_of_tensors_gives_the_same(adapter: Path, load: Load) -> None:
    merged = merge_adapter(load("dinov3-base"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert merge_adapter(load("dinov3-base"), adapter).adapter == merged.adapter
    torch.save({**tensors, "more": DINOV3.__class__}, adapter / "adapter_model.bin")
    with pytest.raises(BackboneError, match="is refused"):
        merge_adapter(load("dinov3-base"), adapter)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        # The pooling head's attention reads this weight past the module, and timm's attention with
        # biases of q and v does so with the fused one: there PEFT's branch has no effect, and was
        # trained to none, while a merged weight has one.
        ("medsiglip", r".*head\.attention\.out_proj"),
        ("timm:vit_tiny_patch16_dinov3_qkvb", r"blocks\.\d+\.attn\.qkv"),
    ],
)
def test_a_merge_that_changes_the_tokens_is_refused(
    name: str, targets: str, load: Load, tmp_path: Path
) -> None:
    write_adapter(load(name).module.model, targets, tmp_path / "adapter")
    with pytest.raises(BackboneError, match="other tokens than unmerged"):
        merge_adapter(load(name), tmp_path / "adapter")


def test_a_second_adapter_on_top_is_refused(adapter: Path, load: Load) -> None:
    merged = merge_adapter(load("dinov3-base"), adapter)
    with pytest.raises(ConfigError, match="freshly loaded"):
        merge_adapter(merged, adapter)


def test_the_adapter_decides_the_settings_and_says_what_it_saw(adapter: Path, load: Load) -> None:
    (adapter / "ctfm_training.json").write_text(json.dumps({"scan_ids": ["c1"]}))
    merged = merge_adapter(load("dinov3-base"), adapter)
    plain = load("dinov3-base")
    assert merged.adapter is not None
    assert merged.settings() == {**plain.settings(), "adapter": merged.adapter.digest}
    assert merged.adapter.scan_ids == {"c1"}
    assert not merged.adapter.patient_ids
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 6}))
    other = merge_adapter(load("dinov3-base"), adapter)
    assert other.adapter is not None
    assert other.adapter.digest != merged.adapter.digest


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def set_config(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def written(load: Load, tmp_path: Path) -> Path:
    """An adapter for a small timm ViT."""
    folder = tmp_path / "adapter"
    write_adapter(load("timm:test_vit").module.model, TIMM, folder)
    return folder


def test_names_that_were_saved_by_hand_are_read(load: Load, written: Path) -> None:
    expected = tokens_of(merge_adapter(load("timm:test_vit"), written))["cls"]
    rewrite(written, lambda held: {n.replace(".weight", ".default.weight"): held[n] for n in held})
    merged = merge_adapter(load("timm:test_vit"), written)
    assert torch.equal(tokens_of(merged)["cls"], expected)
    rewrite(
        written,
        lambda held: held | {n.replace(".default", ""): t.clone() for n, t in held.items()},
    )
    with pytest.raises(BackboneError, match="there twice"):
        merge_adapter(load("timm:test_vit"), written)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: {n: t / 0 if "lora_B" in n else t for n, t in held.items()}, "NaN or inf"),
        (lambda held: {n: t.to(torch.int8) for n, t in held.items()}, "of torch.int8: quantised"),
    ],
)
def test_an_adapter_without_numbers_is_refused(
    load: Load, written: Path, change: Any, says: str
) -> None:
    rewrite(written, change)
    with pytest.raises(BackboneError, match=says):
        merge_adapter(load("timm:test_vit"), written)


def test_two_scales_for_one_module_are_not_chosen_between(load: Load, written: Path) -> None:
    set_config(written, alpha_pattern={"blocks.0.attn.qkv": 64, "qkv": 4})
    with pytest.raises(BackboneError, match=r"several keys.*'blocks\.0\.attn\.qkv': 64, 'qkv': 4"):
        merge_adapter(load("timm:test_vit"), written)
    set_config(written, alpha_pattern={"blocks.0.attn.qkv": 4, "qkv": 4})
    merge_adapter(load("timm:test_vit"), written)
    set_config(written, alpha_pattern={}, rank_pattern={"blocks.0.attn.qkv": 64, "qkv": 3})
    with pytest.raises(BackboneError, match="several keys"):
        merge_adapter(load("timm:test_vit"), written)


def test_what_is_odd_about_an_adapter_is_said(load: Load, written: Path) -> None:
    def remarks() -> str:
        return "; ".join(merge_adapter(load("timm:test_vit"), written).remarks)

    set_config(written, target_modules=["qkv", "proj"])
    assert "adapter" not in remarks()
    set_config(written, target_modules=["qkv", "proj", "fc1"], r=8)
    assert "no pairs for its target_modules fc1" in remarks()
    assert "rank is 3 and not 8" in remarks()
    set_config(written, target_modules=["qkv"], r=3)
    rewrite(written, lambda held: {n: t for n, t in held.items() if "blocks.1.attn.qkv" not in n})
    assert "and not model.blocks.1.attn.qkv" in remarks()
    rewrite(written, lambda held: {n: t * 0 if "lora_B" in n else t for n, t in held.items()})
    assert "changes nothing: all its lora_B are zero" in remarks()
