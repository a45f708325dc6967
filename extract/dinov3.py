"""DINOv3: Meta's self-supervised ViTs (arXiv:2508.10104), run by transformers.

Weights come as safetensors in the hub's layout (`layer.N…`), in that of transformers' memory
(`model.layer.N…`), or in timm's (`blocks.N…`, with or without q and v bias); all become the hub's
before they are checked and digested. timm leaves out what is zero or unused: the mask token, and
in its plain variants the q and v biases. Meta's own `.pth` files are pickles and are not read.

Tokens: `cls`, the class token after the final norm (transformers' `pooler_output`, and what Meta
evaluates); `mean` of the patch tokens, without class and register tokens.

Axes: s slices, m channels, y rows, x columns, n tokens, d embedding.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import IMAGENET_MEAN, IMAGENET_SD, BackboneEntry, Loaded
from ctfm.extract.weights import (
    digest_tensors,
    hub_folder,
    load_completely,
    read_tensors,
    weight_files,
)

Sizes = Mapping[str, int | bool | str]
"""Fields of transformers' `DINOv3ViTConfig`."""


class DINOv3(nn.Module):
    """Pixels to tokens.

    Args:
        model: A transformers `DINOv3ViTModel`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.prefix = 1 + int(model.config.num_register_tokens)

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s d"]]:
        """Class token, and mean of the patch tokens, both after the final norm."""
        hidden: Float[Tensor, "s n d"] = self.model(pixel_values=pixels).last_hidden_state
        return {"cls": hidden[:, 0], "mean": hidden[:, self.prefix :].mean(dim=1)}


def load_dinov3(entry: BackboneEntry, weights: Path | None, *, sizes: Sizes) -> Loaded:
    """Build the ViT and load it, completely or not at all.

    Args:
        entry: Its facts; the hub repository is used if `weights` is None.
        weights: A safetensors file, or a folder with one checkpoint.
        sizes: Fields of transformers' `DINOv3ViTConfig`.

    Raises:
        BackboneError: If the weights are not to be had, or do not fit `sizes` exactly.
    """
    if weights is None:
        assert entry.hub_id is not None
        weights = hub_folder(entry.hub_id, revision=entry.revision, gated=entry.gated)
    module = DINOv3(_build(sizes))
    names = {_hub_name(name): name for name in module.model.state_dict()}
    tensors = _to_hub_layout(read_tensors(weight_files(weights)), expected=names)
    load_completely(module.model, tensors, source=f"{weights} as {entry.name}", names=names)
    held = module.model.state_dict()
    # In the hub's names, which do not change with the version of transformers.
    digest = digest_tensors({of_hub: held[name] for of_hub, name in names.items()})
    return Loaded(module=module, digest=digest)


def _build(sizes: Sizes) -> Any:
    """The ViT with tensors on the meta device, where making 300 M random numbers costs nothing."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(**sizes)
    with torch.device("meta"):
        model = DINOv3ViTModel(config)
    # Not in any checkpoint: computed from the config, so made again off the meta device.
    model.rope_embeddings = type(model.rope_embeddings)(config)
    return model


def _hub_name(name: str) -> str:
    return re.sub(r"^model\.(?=layer\.)", "", name)


_FROM_TIMM = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^blocks\.", "layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.(q|v)_bias$", r".attention.\1_proj.bias"),
    (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.fc1(_x)?\.", ".mlp.up_proj."),
    (r"\.mlp\.fc1_g\.", ".mlp.gate_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
)


def _to_hub_layout(
    tensors: Mapping[str, Tensor], *, expected: Collection[str]
) -> dict[str, Tensor]:
    if "patch_embed.proj.weight" not in tensors:
        return {_hub_name(name): tensor for name, tensor in tensors.items()}
    hub: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed = name
        for pattern, replacement in _FROM_TIMM:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed.endswith(".attn.qkv.weight"):
            attention = renamed.removesuffix("attn.qkv.weight") + "attention."
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                hub[f"{attention}{letter}_proj.weight"] = part
        else:
            hub[renamed] = tensor
    zeros = _zeros_left_out_by_timm(hub)
    return {name: tensor for name, tensor in zeros.items() if name in expected} | hub


def _zeros_left_out_by_timm(hub: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask token, and biases of q and v: zero where timm's plain variants have none."""
    zeros = {
        name.replace(".weight", ".bias"): tensor.new_zeros(len(tensor))
        for name, tensor in hub.items()
        if re.search(r"\.attention\.[qv]_proj\.weight$", name)
    }
    if "embeddings.cls_token" in hub:
        zeros["embeddings.mask_token"] = torch.zeros_like(hub["embeddings.cls_token"])
    return zeros


def _sizes(width: int, layers: int, *, heads: int, mlp: int, **more: bool | str) -> Sizes:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_register_tokens": 4,
        **more,
    }


SMALL = _sizes(384, 12, heads=6, mlp=1536)
SMALL_PLUS = _sizes(384, 12, heads=6, mlp=1536, use_gated_mlp=True, hidden_act="silu")
BASE = _sizes(768, 12, heads=12, mlp=3072)
LARGE = _sizes(1024, 24, heads=16, mlp=4096)
HUGE_PLUS = _sizes(1280, 32, heads=20, mlp=5120, use_gated_mlp=True, hidden_act="silu")
SEVEN_B = _sizes(
    *(4096, 40),
    heads=32,
    mlp=8192,
    use_gated_mlp=True,
    hidden_act="silu",
    query_bias=False,
    value_bias=False,
)

_SOURCES = {
    "architecture": "arXiv:2508.10104; timm 1.0.31, timm/models/eva.py, vit_*_patch16_dinov3",
    "hub_id": "github.com/facebookresearch/dinov3, README.md",
    "revision": "not pinned: no commit could be confirmed",
    "licence": "github.com/facebookresearch/dinov3, LICENSE.md",
    "gated": "model page on the hub",
    "tokens": "transformers 5.23, modeling_dinov3_vit.py: pooler_output",
    "parameters": "counted from transformers' DINOv3ViTModel, mask token included",
    "channels": "transformers 5.23, DINOv3ViTConfig.num_channels",
    "size_px": "dinov3 README.md, make_transform: Resize((256, 256))",
    "mean": "dinov3 README.md, make_transform (ImageNet); the sat493m weights have others",
    "sd": "dinov3 README.md, make_transform (ImageNet); the sat493m weights have others",
    "interpolation": "torchvision v2.Resize in make_transform: bilinear (timm's config: bicubic)",
    "antialias": "dinov3 README.md, make_transform: antialias=True",
    "native_windows_hu": "trained on web images (LVD-1689M)",
    "lora_targets": "module names of transformers 5.23 and of timm 1.0.31",
}


LORA_TARGETS = {
    "hf": r"(?:.*\.)?layer\.\d+\.attention\.[qkvo]_proj",
    "timm": r"(?:.*\.)?blocks\.\d+\.attn\.(?:qkv|proj)",
}


def _entry(
    size: str, sizes: Sizes, *, letters: str, repository: str, parameters: int
) -> BackboneEntry:
    width = int(sizes["hidden_size"])
    feed = ", SwiGLU" if "use_gated_mlp" in sizes else ""
    return BackboneEntry(
        name=f"dinov3-{size}",
        architecture=f"ViT-{letters}/16, RoPE, 4 registers{feed}",
        hub_id=f"facebook/dinov3-{repository}-pretrain-lvd1689m",
        revision=None,
        licence="DINOv3 License",
        gated=True,
        tokens={"cls": width, "mean": width},
        parameters=parameters,
        load=partial(load_dinov3, sizes=sizes),
        skeleton=partial(_build, sizes),
        sources=_SOURCES,
        size_px=(256, 256),
        mean=IMAGENET_MEAN,
        sd=IMAGENET_SD,
        interpolation="bilinear",
        antialias=True,
        lora_targets=LORA_TARGETS,
    )


ENTRIES = (
    _entry("small", SMALL, letters="S", repository="vits16", parameters=21_596_544),
    _entry("small-plus", SMALL_PLUS, letters="S+", repository="vits16plus", parameters=28_692_864),
    _entry("base", BASE, letters="B", repository="vitb16", parameters=85_660_416),
    _entry("large", LARGE, letters="L", repository="vitl16", parameters=303_129_600),
    _entry("huge-plus", HUGE_PLUS, letters="H+", repository="vith16plus", parameters=840_592_640),
    _entry("7b", SEVEN_B, letters="7B", repository="vit7b16", parameters=6_716_035_072),
)
