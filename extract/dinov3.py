"""DINOv3: Meta's self-supervised ViTs (arXiv:2508.10104), run by transformers.

Checkpoints come in four layouts, all of which become the first before they are checked and
digested: the hub's (`layer.N…`); that of transformers' memory (`model.layer.N…`); timm's
(`blocks.N…`, with or without q and v bias); and that of Meta's own `.pth` files (`blocks.N…` with
`storage_tokens`). What a layout has and no output depends on is left out, what it leaves out
because it is zero is put back:

    Meta   a bias of k that its mask makes zero, the masks, the rotary periods (compared with
           those of the config), the norm of local crops in training
    timm   no mask token, and in its plain variants no biases of q and v

Tokens: `cls`, the class token after the final norm (transformers' `pooler_output`, and what Meta
evaluates); `mean` of the patch tokens, without class and register tokens.

Axes: s slices, m channels, y rows, x columns, n tokens, d embedding.
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

Sizes = Mapping[str, int | bool | str]
"""Fields of transformers' `DINOv3ViTConfig`."""

ROPE_BASE = 100.0
"""Of the rotary periods, in every size (dinov3/hub/backbones.py; transformers' default)."""


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


def tower(sizes: Sizes) -> Tower:
    """The ViT of a size.

    Args:
        sizes: Fields of transformers' `DINOv3ViTConfig`.
    """
    return Tower(build=partial(build, sizes), read=partial(read, sizes), released=_hub_name)


def build(sizes: Sizes) -> DINOv3:
    """The ViT, its parameters on the meta device: making 300 M random numbers takes time."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(**sizes)
    with torch.device("meta"):
        model = DINOv3ViTModel(config)
    # Not in any checkpoint: computed from the config, so made again off the meta device.
    model.rope_embeddings = type(model.rope_embeddings)(config)
    return DINOv3(model)


SIGNATURE = Signature(
    mark=re.compile(r"(?:embeddings\.patch_embeddings|patch_embed\.proj)\.weight")
)


def read(sizes: Sizes, weights: Path, key: str | None = None) -> Found:
    """A checkpoint in any of the four layouts, under the hub's names.

    Raises:
        BackboneError: If it cannot be read, or is Meta's of a network that this one is not.
    """
    found = read_network(weights, SIGNATURE, key=key)
    return replace(found, tensors=_under_hub_names(found.tensors, sizes))


def _under_hub_names(tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    if "storage_tokens" in tensors:
        head_width = int(sizes["hidden_size"]) // int(sizes["num_attention_heads"])
        return _from_meta(tensors, head_width=head_width)
    if "patch_embed.proj.weight" in tensors:
        return _from_timm(tensors, biased=bool(sizes.get("query_bias", True)))
    return {_hub_name(name): tensor for name, tensor in tensors.items()}


def _hub_name(name: str) -> str:
    return re.sub(r"^(?:model\.)+", "", name)


_SHARED_RULES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^blocks\.", "layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
)
_FROM_TIMM = (
    *_SHARED_RULES,
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"\.attn\.(q|v)_bias$", r".attention.\1_proj.bias"),
    (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.fc1(_x)?\.", ".mlp.up_proj."),
    (r"\.mlp\.fc1_g\.", ".mlp.gate_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
)
_FROM_META = (
    *_SHARED_RULES,
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.(?:fc1|w2)\.", ".mlp.up_proj."),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
    (r"\.mlp\.(?:fc2|w3)\.", ".mlp.down_proj."),
)
_QKV = ".attn.qkv."


def _renamed(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Under other names, and with the fused projections of q, k and v parted."""
    hub: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        layer, fused, kind = name.partition(_QKV)
        if not fused or tensor.ndim == 0 or len(tensor) % 3:
            hub[name] = tensor  # if it is fused, an unexpected one
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            hub[f"{layer}.attention.{letter}_proj.{kind}"] = part
    return hub


def _from_timm(tensors: Mapping[str, Tensor], *, biased: bool) -> dict[str, Tensor]:
    hub = _renamed(tensors, _FROM_TIMM)
    left_out: dict[str, Tensor] = {}
    if "embeddings.cls_token" in hub:
        left_out["embeddings.mask_token"] = torch.zeros_like(hub["embeddings.cls_token"])
    for name, weight in hub.items() if biased else ():
        if re.search(r"\.attention\.[qv]_proj\.weight$", name):
            left_out[name.replace(".weight", ".bias")] = weight.new_zeros(len(weight))
    return left_out | hub


def _from_meta(tensors: Mapping[str, Tensor], *, head_width: int) -> dict[str, Tensor]:
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("local_cls_norm.") and not name.endswith(".bias_mask")
    }
    if (periods := kept.pop("rope_embed.periods", None)) is not None:
        _check_periods(periods, head_width=head_width)
    for name, mask in tensors.items():
        if name.endswith(".bias_mask"):
            bias = name.removesuffix("_mask")
            kept[bias] = _without_k(kept.get(bias), mask, name=bias)
    hub = _renamed(kept, _FROM_META)
    if (mask_token := hub.get("embeddings.mask_token")) is not None:
        hub["embeddings.mask_token"] = mask_token.unsqueeze(0)
    return {n: t for n, t in hub.items() if not n.endswith(".k_proj.bias") or bool(t.any())}


def _check_periods(periods: Tensor, *, head_width: int) -> None:
    """Refuse a network of other rotary frequencies; those of the config are used, unrounded."""
    n = head_width // 4
    expected = ROPE_BASE ** (torch.arange(n, dtype=torch.float32) / n)
    # To what rounding to bfloat16 leaves of them.
    if periods.shape != (n,) or not torch.allclose(periods.float(), expected, rtol=1e-2, atol=0.0):
        raise BackboneError(
            f"the checkpoint has the rotary periods {_shown(periods)}, this DINOv3 has "
            f"{_shown(expected)}: it is of another network"
        )


def _shown(periods: Tensor) -> str:
    return ", ".join(f"{float(period):.4g}" for period in periods.flatten()[:8])


def _without_k(bias: Tensor | None, mask: Tensor, *, name: str) -> Tensor:
    """The bias of q, k and v with that of k zero, which its mask must say and nothing else."""
    expected = torch.ones(3, mask.numel() // 3).index_fill(0, torch.tensor([1]), 0.0).flatten()
    if bias is None or bias.shape != mask.shape or not torch.equal(mask.float(), expected):
        raise BackboneError(
            f"{name} has a mask that does not leave out the bias of k alone: the file is not "
            "one of Meta's releases"
        )
    return bias * expected.to(bias)


def _sizes(width: int, layers: int, *, heads: int, mlp: int) -> Sizes:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_register_tokens": 4,
    }


_GATED: Sizes = {"use_gated_mlp": True, "hidden_act": "silu"}

SMALL = _sizes(384, 12, heads=6, mlp=1536)
SMALL_PLUS = {**_sizes(384, 12, heads=6, mlp=1536), **_GATED}
BASE = _sizes(768, 12, heads=12, mlp=3072)
LARGE = _sizes(1024, 24, heads=16, mlp=4096)
HUGE_PLUS = {**_sizes(1280, 32, heads=20, mlp=5120), **_GATED}
SEVEN_B = {
    **_sizes(4096, 40, heads=32, mlp=8192),
    **_GATED,
    "query_bias": False,
    "value_bias": False,
}

_SOURCES = {
    "architecture": "arXiv:2508.10104; timm 1.0.31, timm/models/eva.py, vit_*_patch16_dinov3",
    "hub_id": "github.com/facebookresearch/dinov3, README.md",
    "revision": "commit that ten public repositories name alike, November 2026; "
    "huggingface.co/<hub_id>/commits/main has it",
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
    size: str, sizes: Sizes, *, letters: str, repository: str, revision: str, parameters: int
) -> BackboneEntry:
    width, network = int(sizes["hidden_size"]), tower(sizes)
    feed = ", SwiGLU" if "use_gated_mlp" in sizes else ""
    return BackboneEntry(
        name=f"dinov3-{size}",
        architecture=f"ViT-{letters}/16, RoPE, 4 registers{feed}",
        hub_id=f"facebook/dinov3-{repository}-pretrain-lvd1689m",
        revision=revision,
        licence="DINOv3 License",
        gated=True,
        tokens={"cls": width, "mean": width},
        parameters=parameters,
        load=network.load,
        skeleton=network.build,
        released=network.released,
        sources=_SOURCES,
        size_px=(256, 256),
        mean=IMAGENET_MEAN,
        sd=IMAGENET_SD,
        interpolation="bilinear",
        antialias=True,
        lora_targets=LORA_TARGETS,
    )


ENTRIES = (
    _entry(
        "small",
        SMALL,
        letters="S",
        repository="vits16",
        revision="114c1379950215c8b35dfcd4e90a5c251dde0d32",
        parameters=21_596_544,
    ),
    _entry(
        "small-plus",
        SMALL_PLUS,
        letters="S+",
        repository="vits16plus",
        revision="c93d816fc9e567563bc068f01475bec89cc634a6",
        parameters=28_692_864,
    ),
    _entry(
        "base",
        BASE,
        letters="B",
        repository="vitb16",
        revision="5931719e67bbdb9737e363e781fb0c67687896bc",
        parameters=85_660_416,
    ),
    _entry(
        "large",
        LARGE,
        letters="L",
        repository="vitl16",
        revision="ea8dc2863c51be0a264bab82070e3e8836b02d51",
        parameters=303_129_600,
    ),
    _entry(
        "huge-plus",
        HUGE_PLUS,
        letters="H+",
        repository="vith16plus",
        revision="c807c9eeea853df70aec4069e6f56b28ddc82acc",
        parameters=840_592_640,
    ),
    _entry(
        "7b",
        SEVEN_B,
        letters="7B",
        repository="vit7b16",
        revision="b80367753773648a6793235ab9c65cdbb029506f",
        parameters=6_716_035_072,
    ),
)
