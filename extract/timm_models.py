"""`timm:<name>`: any image model of timm, with timm's own weights or a local checkpoint.

Size, mean, sd and interpolation are those of timm's data config; its centre crop is not taken,
because it would cut the head off. timm's filter of checkpoint names is used, its habit of loading
what fits is not: the classifier is dropped, and every other tensor must be there.

Tokens: `cls` is the class token after the final norm, whatever timm would pool by default, or
without a class token what the model pools (average or attention, before the classifier); `mean`,
of models that keep a sequence of patch tokens, is their mean. Where a model norms after pooling
(`fc_norm`), both are normed so.

Axes: s slices, m channels, y rows, x columns, d embedding.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import Asked, BackboneEntry, Loaded, one_source
from ctfm.extract.network_part import Signature
from ctfm.extract.weights import digest_tensors, read_network
from ctfm.store.errors import BackboneError

PREFIX = "timm:"


class TimmTokens(nn.Module):
    """Pixels to tokens.

    Args:
        model: A timm model without classifier.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.prefix = int(getattr(model, "num_prefix_tokens", self.has_class_token))
        self.norm = getattr(model, "fc_norm", None) or nn.Identity()

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """Class token or pooled vector, and mean of the patch tokens if there are any."""
        features = self.model.forward_features(pixels)
        if features.ndim != 3:
            return {"cls": self.model.forward_head(features, pre_logits=True)}
        mean = self.norm(features[:, self.prefix :].mean(dim=1))
        if self.has_class_token:
            return {"cls": self.norm(features[:, 0]), "mean": mean}
        return {"cls": self.model.forward_head(features, pre_logits=True), "mean": mean}


def timm_entry(asked: Asked) -> BackboneEntry:
    """The facts about a timm model, asked of timm itself; nothing is loaded.

    Args:
        asked: `timm:<model>` or `timm:<model>.<tag>`.

    Raises:
        BackboneError: If timm has no such model.
    """
    from timm.data import resolve_model_data_config

    with torch.device("meta"):
        model = TimmTokens(_create(asked.name)).eval()
    data = resolve_model_data_config(model.model)
    config = model.model.pretrained_cfg
    with torch.inference_mode():
        tokens = model(torch.empty(1, *data["input_size"], device="meta"))
    return BackboneEntry(
        name=asked.name,
        architecture=type(model.model).__name__,
        hub_id=config.get("hf_hub_id"),
        revision=None,
        licence=config.get("license") or "not stated",
        gated=False,
        tokens={token: values.shape[1] for token, values in tokens.items()},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        load=load_timm,
        sources=one_source("timm: pretrained_cfg and data config of the model"),
        channels=data["input_size"][0],
        size_px=tuple(data["input_size"][1:]),
        mean=tuple(data["mean"]),
        sd=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
    )


def load_timm(entry: BackboneEntry, weights: Path | None) -> Loaded:
    """Build a timm model and load it, completely or not at all.

    Args:
        entry: From `timm_entry`.
        weights: A checkpoint in timm's layout, with or without classifier.

    Raises:
        BackboneError: If the weights are not to be had, or do not fit exactly.
    """
    if weights is None:
        raise BackboneError(f"timm has no weights for {entry.name}: pass `--weights FILE`")
    found = read_network(weights, _signature(entry.name), key=entry.weights_key)
    try:
        model = _create(entry.name, tensors=found.tensors)
    except RuntimeError as error:
        fact = " ".join(str(error).split())[:500]
        raise BackboneError(
            f"{weights} does not fit {entry.name}: {fact}. Give the checkpoint of this very model"
        ) from error
    digest = digest_tensors(model.state_dict())
    return Loaded(module=TimmTokens(model), digest=digest, remarks=found.remarks)


def _signature(name: str) -> Signature:
    """Of a model in timm's layout: its longest name, which no part of it is likely to repeat."""
    with torch.device("meta"):
        own = _create(name).state_dict()
    return Signature(mark=re.compile(re.escape(max(own, key=len))), own=frozenset(own))


def _create(name: str, *, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """A timm model without classifier: random, or with `tensors` loaded strictly."""
    import timm

    model_name = name.removeprefix(PREFIX)
    if not timm.is_model(model_name):
        near = get_close_matches(model_name, timm.list_models(pretrained=True), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise BackboneError(f"timm has no model {model_name!r}: {hint}")
    if tensors is None:
        return timm.create_model(model_name, pretrained=False, num_classes=0)
    config = timm.get_pretrained_cfg(model_name)
    classifiers = config.classifier if config is not None else None
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers or ())
    heads = {f"{head}.{part}" for head in names for part in ("weight", "bias")}
    tower = {key: tensor for key, tensor in tensors.items() if key not in heads}
    # timm loads strictly only if both sides agree on the number of classes: none.
    overlay = {"state_dict": tower, "num_classes": 0, "custom_load": False, "source": ""}
    model = timm.create_model(
        model_name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
    )
    model.pretrained_cfg.pop("state_dict", None)
    return model
