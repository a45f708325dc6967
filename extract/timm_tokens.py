"""A timm model, to the tokens of an image.

`cls` is the class token after the final norm, whatever timm would pool by default, or without a
class token what the model pools (average or attention, before the classifier); `mean`, of models
that keep a sequence of patch tokens, is their mean. Where a model norms after pooling (`fc_norm`),
both are normed so.

Axes: s slices, m channels, y rows, x columns, d embedding.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.patch_grid import Size, pair, place_counts, tokens_before_patches


class TimmTokens(nn.Module):
    """Pixels to tokens.

    Args:
        model: A timm model without classifier.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        class_token = getattr(model, "cls_token", None)
        self.has_class_token = class_token is not None
        own = 0 if class_token is None else class_token.shape[1]
        self.prefix = int(getattr(model, "num_prefix_tokens", own))
        self.norm = getattr(model, "fc_norm", None) or nn.Identity()
        self.patch_px = pair(getattr(getattr(model, "patch_embed", None), "patch_size", None))

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """Class token or pooled vector, and mean of the patch tokens if there are any."""
        features = self.model.forward_features(pixels)
        if features.ndim != 3:
            return {"cls": self.model.forward_head(features, pre_logits=True)}
        if self.has_class_token:
            cls = self.norm(features[:, 0])
        else:
            cls = self.model.forward_head(features, pre_logits=True)
        before = self._before(features.shape[1], (pixels.shape[2], pixels.shape[3]))
        if before is None:
            return {"cls": cls}
        return {"cls": cls, "mean": self.norm(features[:, before:].mean(dim=1))}

    def _before(self, n_tokens: int, size_px: Size) -> int | None:
        """How many tokens come before the patches; None if there are none, or it is not known.

        Not every model says it: CoaT has a class token that it does not count, and of PiT nothing
        but class tokens comes out.
        """
        if n_tokens == self.prefix:
            return None
        if n_tokens - self.prefix in place_counts(size_px, patch_px=self.patch_px):
            return self.prefix
        return tokens_before_patches(n_tokens, size_px, patch_px=None, special={1})
