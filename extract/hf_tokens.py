"""A transformers vision model, to the tokens of an image.

`cls` is the first token of a model that has a class token, else what its pooling gives, else the
mean; `mean` is that of the patch tokens or places, without class, distillation and register tokens
(`ctfm.extract.patch_grid`); `pooler` is the output of the pooling layer. All are after the final
norm.

Axes: s slices, m channels, y rows, x columns, n tokens, d embedding.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.patch_grid import Size, pair, tokens_before_patches
from ctfm.store.errors import BackboneError

_SPECIAL = re.compile(
    r"(?:.*\.)?(?:cls|class|distillation|register|cls_register)_(?:tokens?|embedding)"
)
"""Names of parameters that are tokens of no place, as transformers 4.57 and 5.23 have them."""


class HfTokens(nn.Module):
    """Pixels to tokens.

    Args:
        model: A transformers vision model, or one with a `vision_model`.
        norm_is_due: Whether the last hidden state still lacks the norm, as `trial` tells.
    """

    def __init__(self, model: Any, *, norm_is_due: bool = False) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        self.norm_is_due = norm_is_due
        config = getattr(self.model, "config", None)
        self.patch_px = pair(getattr(config, "patch_size", None))
        registers = getattr(config, "num_register_tokens", None)
        self.n_registers = registers if isinstance(registers, int) else 0
        self.special = {1 + self.n_registers, self.n_registers, _count_special(self.model)}

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """Every token that the outputs allow."""
        output = self.model(pixel_values=pixels)
        hidden = output.last_hidden_state
        if self.norm_is_due:
            hidden = self.model.post_layernorm(hidden)
        size_px = (pixels.shape[2], pixels.shape[3])
        hidden, before = self._sequence(hidden, size_px)
        tokens = {"mean": hidden[:, before:].mean(dim=1)}
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            tokens["pooler"] = pooled.flatten(1)
        has_class = before > self.n_registers
        own = hidden[:, 0] if has_class else tokens.get("pooler", tokens["mean"])
        return {"cls": own, **tokens}

    def _sequence(self, hidden: Tensor, size_px: Size) -> tuple[Float[Tensor, "s n d"], int]:
        """The last hidden state as a sequence, and how many of it come before the patches."""
        if hidden.ndim == 4 and not _channels_last(hidden, size_px):
            return hidden.flatten(2).transpose(1, 2), 0
        before = None
        if hidden.ndim == 3:
            before = tokens_before_patches(
                hidden.shape[1], size_px, patch_px=self.patch_px, special=self.special
            )
        if before is None:
            raise BackboneError(
                f"{type(self.model).__name__} gives tokens of shape {tuple(hidden.shape[1:])} for "
                f"an image of {size_px[0]} × {size_px[1]} pixels: which of them are its patches "
                "cannot be told from its configuration. Save what you need of it as a program "
                "(`.pt2`), and pass that as --model"
            )
        return hidden, before


def trial(module: HfTokens, shape: tuple[int, int, int]) -> dict[str, int]:
    """Run a model on an image of zeros; sets its `norm_is_due`.

    CLIP's last hidden state lacks the norm, because it pools first and norms what it pooled: its
    norm is seen to take two axes.

    Args:
        module: On any device, also on the meta device.
        shape: (m, y, x) of an image.

    Returns:
        d of each token.
    """
    axes: list[int] = []
    norm = getattr(module.model, "post_layernorm", None) or nn.Identity()
    device = next(module.parameters()).device
    hook = norm.register_forward_hook(lambda module, given, normed: axes.append(normed.ndim))
    with hook, torch.inference_mode():
        tokens = module(torch.zeros(1, *shape, device=device))
    module.norm_is_due = axes == [2]
    return {name: int(values.shape[1]) for name, values in tokens.items()}


def _channels_last(places: Tensor, size_px: Size) -> bool:
    """Whether a map has the proportions of the image in its first two axes, and only there."""
    first, second, third = places.shape[1:]
    y, x = size_px
    return first * x == second * y and second * x != third * y


def _count_special(model: nn.Module) -> int:
    """How many tokens of no place its parameters are: (1 n d), or (d) for one."""
    return sum(
        parameter.shape[-2] if parameter.ndim > 1 else 1
        for name, parameter in model.named_parameters()
        if _SPECIAL.fullmatch(name)
    )
