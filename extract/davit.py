"""`medimageinsight`: the DaViT image encoder of MedImageInsight, to tokens.

The network is transformers' Florence-2 vision backbone; around it are the mean over the places,
a last norm and the projection that the released model applies. Embeddings are not normalised to
length one, as they are upstream: a head loses nothing by their length, and may use it.

The released file is safetensors with the suffix `.pt` and holds a text encoder too, which is not
read. Both generations of names that the released code reads are understood.

Axes: s slices, m channels, y rows, x columns, n places, d embedding.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import IMAGENET_MEAN, IMAGENET_SD, BackboneEntry
from ctfm.extract.network_part import Signature
from ctfm.extract.tower import Tower
from ctfm.extract.weights import Found, read_network
from ctfm.store.errors import BackboneError

Sizes = Mapping[str, Sequence[int] | int]
"""Fields of transformers' `Florence2VisionConfig`; `projection_dim` is d."""

TOWER = re.compile(r"(?:(?:image_encoder|visual)\.|(?=image_projection$|vision_projection$))")

SIGNATURE = Signature(mark=re.compile(r"(?:convs|conv_embeds)\.0\.proj\.weight"), belongs=TOWER)


class DaViT(nn.Module):
    """Pixels to tokens.

    Args:
        sizes: Of the network.
    """

    def __init__(self, sizes: Sizes) -> None:
        from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
        from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

        super().__init__()
        config = Florence2VisionConfig(**sizes)
        self.model: Any = Florence2VisionBackbone(config)
        width = config.embed_dim[-1]
        self.norms = nn.LayerNorm(width)
        self.image_projection = nn.Parameter(torch.empty(width, config.projection_dim))

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """`cls`, the projected embedding, and `mean`, the normalised mean before it."""
        output = self.model(pixels)
        places = getattr(output, "last_hidden_state", output)
        mean = self.norms(places.flatten(2).mean(dim=2))
        return {"cls": mean @ self.image_projection, "mean": mean}


def tower(sizes: Sizes) -> Tower:
    """The network of a size.

    Args:
        sizes: Fields of transformers' `Florence2VisionConfig`.
    """
    return Tower(build=partial(build, sizes), read=read, released=_released_name)


def build(sizes: Sizes) -> DaViT:
    """The network on the meta device."""
    with torch.device("meta"):
        return DaViT(sizes)


def read(weights: Path, key: str | None = None) -> Found:
    """The image encoder of the released file, or of the folder that holds it, in its names."""
    found = read_network(_released_file(weights), SIGNATURE, key=key)
    present = {_present_name(name): value for name, value in found.tensors.items()}
    return replace(found, tensors=present)


def _released_file(weights: Path) -> Path:
    if not weights.is_dir():
        return weights
    found = sorted(weights.rglob("medimageinsigt*.pt"))  # spelled so by its authors
    if len(found) != 1:
        raise BackboneError(
            f"{weights} holds {len(found)} files medimageinsigt*.pt, one is needed: name the file"
        )
    return found[0]


_BLOCK = r"blocks\.(\d+)\.(\d+)\."
_FROM_OLDER = (
    (r"^vision_projection$", "image_projection"),
    (r"^conv_embeds\.", "convs."),
    (r"^main_blocks\.", "blocks."),
    (rf"^{_BLOCK}0\.", r"blocks.\1.\2.spatial_block."),
    (rf"^{_BLOCK}1\.", r"blocks.\1.\2.channel_block."),
    (r"_block\.cpe\.0\.proj\.", "_block.conv1.fn.dw."),
    (r"_block\.cpe\.1\.proj\.", "_block.conv2.fn.dw."),
    (r"spatial_block\.attn\.", "spatial_block.window_attn.fn."),
    (r"channel_block\.attn\.", "channel_block.channel_attn.fn."),
    (r"spatial_block\.norm1\.", "spatial_block.window_attn.norm."),
    (r"channel_block\.norm1\.", "channel_block.channel_attn.norm."),
    (r"_block\.norm2\.", "_block.ffn.norm."),
    (r"_block\.mlp\.", "_block.ffn.fn.net."),
)
"""From the names of an older generation to those of the released file."""

_TO_RELEASED = (
    (r"^model\.", ""),
    (r"^(convs\.\d+)\.conv\.", r"\1.proj."),
    (r"\.conv([12])\.", r".conv\1.fn.dw."),
    (r"\.(window|channel)_attn\.", r".\1_attn.fn."),
    (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
    (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
    (r"\.norm2\.", ".ffn.norm."),
    (r"\.ffn\.(fc[12])\.", r".ffn.fn.net.\1."),
)
"""From the module's names to those of the released file."""


def _present_name(name: str) -> str:
    return _renamed(name, _FROM_OLDER)


def _released_name(name: str) -> str:
    return _renamed(name, _TO_RELEASED)


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


SIZES: Sizes = {
    "embed_dim": (256, 512, 1024, 2048),
    "num_heads": (8, 16, 32, 64),
    "num_groups": (8, 16, 32, 64),
    "depths": (1, 1, 9, 1),
    "window_size": 12,
    "projection_dim": 1024,
}
NETWORK = tower(SIZES)

_REFERENCE = "github.com/YalaLab/rate-evals, rate_eval/models/medimageinsight.py"
_SOURCES = {
    "architecture": f"{_REFERENCE}: DaViT; arXiv:2410.06542",
    "hub_id": "github.com/YalaLab/rate-evals, configs/model/medimageinsight.yaml (a mirror; the "
    "official place is the Azure AI model catalogue)",
    "revision": "not pinned: no public source names a commit; the store says which was used",
    "licence": "model page on the hub",
    "gated": "model page on the hub",
    "tokens": f"{_REFERENCE}: encode_image, before it is normalised",
    "parameters": "counted from the module, projection included",
    "channels": f"{_REFERENCE}: in_chans",
    "size_px": "2024.09.27/config.yaml: IMAGE_SIZE",
    "mean": "2024.09.27/config.yaml: IMAGE_MEAN (ImageNet)",
    "sd": "2024.09.27/config.yaml: IMAGE_STD (ImageNet)",
    "interpolation": "2024.09.27/config.yaml: bicubic",
    "antialias": "without effect from the grid of 224 px, which is enlarged",
    "native_windows_hu": "not stated",
    "lora_targets": "module names of transformers 5.23; the patch embedding is also called proj",
}

ENTRIES: tuple[BackboneEntry, ...] = (
    BackboneEntry(
        name="medimageinsight",
        architecture="DaViT, 4 stages, with image projection",
        hub_id="lion-ai/MedImageInsights",
        revision=None,
        licence="MIT",
        gated=False,
        tokens={"cls": 1024, "mean": 2048},
        parameters=362_733_568,
        load=NETWORK.load,
        skeleton=NETWORK.build,
        released=NETWORK.released,
        sources=_SOURCES,
        size_px=(480, 480),
        mean=IMAGENET_MEAN,
        sd=IMAGENET_SD,
        interpolation="bicubic",
        batch_size=16,
        files=("2024.09.27/vision_model/*.pt",),
        lora_targets={"hf": r"(?:.*\.)?blocks\..*_attn\.(?:qkv|proj)"},
    ),
)
