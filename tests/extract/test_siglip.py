"""MedGemma's and MedSigLIP's image towers: transformers' output, from every layout."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ctfm.extract.backbone import BackboneEntry, load_backbone
from ctfm.extract.backbones import BACKBONES
from ctfm.extract.siglip import MEDGEMMA, MEDSIGLIP, build, tower
from ctfm.store.errors import BackboneError

PREFIXES = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.",
    "vision_model.",
    "",
)
TEXT = {
    "language_model.model.embed_tokens.weight": torch.ones(3, 2),
    "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(4),
    "text_model.embeddings.token_embedding.weight": torch.ones(3, 2),
}


def sizes(head: bool) -> dict[str, int | bool]:
    return {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "patch_size": 7,
        "image_size": 28,
        "vision_use_head": head,
    }


def entry(name: str) -> BackboneEntry:
    small = sizes(head=name == "medsiglip")
    return replace(
        BACKBONES[name],
        tokens={"cls": 24, "mean": 24},
        size_px=(28, 28),
        load=tower(small).load,
    )


def reference(name: str) -> torch.nn.Module:
    """Transformers' own model with random weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(4)
    config = SiglipVisionConfig(**sizes(head=name == "medsiglip"))
    model: torch.nn.Module = SiglipVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def bare(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its tensors without any prefix."""
    return {name.removeprefix("vision_model."): t for name, t in model.state_dict().items()}


def saved(model: torch.nn.Module, folder: Path, prefix: str = "vision_model.") -> Path:
    tensors = {prefix + name: tensor.clone() for name, tensor in bare(model).items()}
    save_file({**tensors, **TEXT}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["medgemma", "medsiglip"])
def test_gives_what_transformers_gives_from_every_layout(
    name: str, prefix: str, tmp_path: Path
) -> None:
    model = reference(name)
    backbone = load_backbone(entry(name), saved(model, tmp_path, prefix))
    pixels = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixel_values=pixels)
        tokens = backbone.module(pixels)
    mean = expected.last_hidden_state.mean(dim=1)
    own = expected.pooler_output if name == "medsiglip" else mean
    torch.testing.assert_close(tokens["cls"], own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens["mean"], mean, rtol=1e-5, atol=1e-5)


def test_a_gemma_checkpoint_as_transformers_writes_it_gives_its_tower(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = sizes(head=False)
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 300,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=290,
        eoi_token_index=291,
        image_token_index=292,
    )
    torch.manual_seed(5)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    backbone = load_backbone(entry("medgemma"), tmp_path)
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        expected = whole.model.vision_tower(pixel_values=pixels).last_hidden_state.mean(dim=1)
        tokens = backbone.module(pixels)
    torch.testing.assert_close(tokens["cls"], expected, rtol=1e-5, atol=1e-5)


def test_only_the_shards_that_hold_the_tower_are_needed(tmp_path: Path) -> None:
    tensors = {f"vision_tower.{name}": t.clone() for name, t in bare(reference("medgemma")).items()}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(TEXT, "model-00002-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    load_backbone(entry("medgemma"), tmp_path)
    weight_map[next(iter(tensors))] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BackboneError, match="model-00002-of-00002"):
        load_backbone(entry("medgemma"), tmp_path)


def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"vision_tower.encoder.a": torch.ones(1)}, outside)
    folder = tmp_path / "weights"
    folder.mkdir()
    weight_map = {"vision_tower.encoder.a": "../outside.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BackboneError, match="not in it"):
        load_backbone(entry("medgemma"), folder)


@pytest.mark.parametrize("name", ["medgemma", "medsiglip"])
def test_loads_completely_or_not_at_all(name: str, tmp_path: Path) -> None:
    other = "medsiglip" if name == "medgemma" else "medgemma"
    wrong = "unexpected" if name == "medgemma" else "missing"
    with pytest.raises(BackboneError, match=wrong) as caught:
        load_backbone(entry(name), saved(reference(other), tmp_path))
    assert "head." in str(caught.value)


def test_a_checkpoint_without_a_tower_is_said_so(tmp_path: Path) -> None:
    save_file(TEXT, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match="no tensor of this backbone"):
        load_backbone(entry("medsiglip"), tmp_path)


@pytest.mark.parametrize(("name", "full"), [("medgemma", MEDGEMMA), ("medsiglip", MEDSIGLIP)])
def test_at_full_size_it_has_the_stated_parameters_and_width(
    name: str, full: dict[str, int | bool]
) -> None:
    model, facts = build(full).model, BACKBONES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == facts.parameters
    assert facts.size_px == (full["image_size"], full["image_size"])
    with torch.device("meta"):
        model.to("meta")
        output = model(pixel_values=torch.empty(2, 3, *facts.size_px))
    n_patches = (facts.size_px[0] // 14) ** 2
    assert output.last_hidden_state.shape == (2, n_patches, 1152)
    assert (output.pooler_output is None) == (name == "medgemma")


def test_lora_targets_leave_out_the_pooling_head() -> None:
    names = [name for name, _ in build(MEDSIGLIP).named_modules()]
    pattern = BACKBONES["medsiglip"].lora_targets["hf"]
    hit = [name for name in names if re.fullmatch(pattern, name)]
    assert len(hit) == 27 * 4
    assert not any("head" in name for name in hit)
