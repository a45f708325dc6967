"""`medgemma`, `medsiglip`: the SigLIP image towers of Google's medical models, to tokens.

Built by transformers from the sizes below; only the tensors of the image tower are read, from
whichever shards hold them, in any layout in which transformers has written them: with or without
`model.`, `vision_tower.` and `vision_model.` before the name.

Tokens: MedSigLIP's `cls` is the output of its attention-pooling head; MedGemma's tower has none,
so that its `cls` is the mean of the patch tokens after the last norm. `mean` is that mean.

Axes: s slices, m channels, y rows, x columns, n patch tokens, d embedding.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import BackboneEntry
from ctfm.extract.network_part import Signature
from ctfm.extract.tower import Tower
from ctfm.extract.weights import Found, read_network

Sizes = Mapping[str, int | bool]
"""Fields of transformers' `SiglipVisionConfig`."""

TOWER = re.compile(
    r"(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?"
    r"(?=(?:embeddings|encoder|post_layernorm|head)\.)"
)


class SiglipTokens(nn.Module):
    """Pixels to tokens.

    Args:
        model: A transformers `SiglipVisionModel`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """`cls` and `mean` of every slice."""
        output = self.model(pixel_values=pixels)
        mean = output.last_hidden_state.mean(dim=1)
        pooled = output.pooler_output
        return {"cls": mean if pooled is None else pooled, "mean": mean}


SIGNATURE = Signature(mark=re.compile(r"embeddings\.patch_embedding\.weight"), belongs=TOWER)


def tower(sizes: Sizes) -> Tower:
    """The image tower of a size.

    Args:
        sizes: Fields of transformers' `SiglipVisionConfig`.
    """
    return Tower(build=partial(build, sizes), read=read, released=_bare)


def read(weights: Path, key: str | None = None) -> Found:
    """The image tower of a checkpoint, under its names without any prefix."""
    return read_network(weights, SIGNATURE, key=key)


def _bare(name: str) -> str:
    return TOWER.sub("", name, count=1)


def build(sizes: Sizes) -> SiglipTokens:
    """The tower on the meta device, but for what no checkpoint holds."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**sizes)
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    for part in model.modules():
        if "position_ids" in part._buffers:
            n_patches = (config.image_size // config.patch_size) ** 2
            part.position_ids = torch.arange(n_patches)[None]
    return SiglipTokens(model)


def _sizes(image_size: int, *, head: bool) -> Sizes:
    return {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": image_size,
        "vision_use_head": head,
    }


MEDGEMMA = _sizes(896, head=False)
MEDSIGLIP = _sizes(448, head=True)

_WINDOWS_HU = ((-1024.0, 1024.0), (-135.0, 215.0), (0.0, 80.0))

_SOURCES = {
    "architecture": "arXiv:2507.05201 (MedGemma), Sec. 2; SigLIP-so400m/14, arXiv:2303.15343",
    "hub_id": "model page on the hub",
    "revision": "commit that ten public repositories name alike, November 2026; "
    "huggingface.co/<hub_id>/commits/main has it",
    "licence": "model page on the hub: Health AI Developer Foundations terms",
    "gated": "model page on the hub",
    "tokens": "transformers 5.23, modeling_siglip.py: pooler_output, last_hidden_state",
    "parameters": "counted from transformers' SiglipVisionModel",
    "channels": "transformers 5.23, SiglipVisionConfig.num_channels",
    "size_px": "arXiv:2507.05201, Sec. 2: 896 (MedGemma), 448 (MedSigLIP)",
    "mean": "image processors of Gemma 3 and SigLIP: 0.5",
    "sd": "image processors of Gemma 3 and SigLIP: 0.5",
    "interpolation": "Gemma 3's image processor: bilinear",
    "antialias": "MedSigLIP's model page resizes with tf.image.resize, antialias=False; without "
    "effect from the grid of 224 px, which both enlarge",
    "native_windows_hu": "Google's CT notebook for MedGemma, as quoted by others; not confirmed",
    "lora_targets": "module names of transformers 5.23; the pooling head is left out, because its "
    "attention reads the weight past the adapter",
}

LORA_TARGETS = {"hf": r"(?:.*\.)?encoder\.layers\.\d+\.self_attn\.(?:[qkv]|out)_proj"}


def _entry(
    name: str, sizes: Sizes, *, architecture: str, hub_id: str, revision: str, parameters: int
) -> BackboneEntry:
    width, size_px = int(sizes["hidden_size"]), int(sizes["image_size"])
    network = tower(sizes)
    return BackboneEntry(
        name=name,
        architecture=architecture,
        hub_id=hub_id,
        revision=revision,
        licence="Health AI Developer Foundations",
        gated=True,
        tokens={"cls": width, "mean": width},
        parameters=parameters,
        load=network.load,
        skeleton=network.build,
        released=network.released,
        tower=TOWER,
        sources=_SOURCES,
        size_px=(size_px, size_px),
        mean=(0.5, 0.5, 0.5),
        sd=(0.5, 0.5, 0.5),
        antialias=False,
        native_windows_hu=_WINDOWS_HU,
        batch_size=16,
        lora_targets=LORA_TARGETS,
    )


ENTRIES: tuple[BackboneEntry, ...] = (
    _entry(
        "medgemma",
        MEDGEMMA,
        architecture="SigLIP-so400m/14 tower of MedGemma 4B",
        hub_id="google/medgemma-4b-it",
        revision="290cda5eeccbee130f987c4ad74a59ae6f196408",
        parameters=416_866_032,
    ),
    _entry(
        "medsiglip",
        MEDSIGLIP,
        architecture="SigLIP-so400m/14 with pooling head",
        hub_id="google/medsiglip-448",
        revision="9cea28a1a1195f665105faa6e8544c112fd960a4",
        parameters=428_565_440,
    ),
)
