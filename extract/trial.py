"""A backbone that was just loaded, to whether an image's tokens depend on that image alone.

Rows of a store are made in batches of any size and order, and made again after an interruption.
So a network that draws at random when it is read (a masked autoencoder hides patches, dropout
that evaluation does not switch off), or that mixes the images of a batch (batch statistics), is
refused. Two images at once are compared with the first of them alone: one comparison for both.

Axes: s samples, m channels, d embedding.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.store.errors import BackboneError

TOLERANCE = 1e-3
"""Largest difference, relative to the token. Kernels for another batch differ by at most 6e-7
(random ViT-B/16, ResNet-50, ConvNeXt, Swin, EfficientNet; torch 2.15, float32, CPU); dropout of one
number of the token in a thousand makes a difference of √0.001, 3e-2."""


def check_repeatable(
    module: nn.Module,
    pixels: Float[Tensor, "2 m *size"],
    *,
    tokens: Mapping[str, int],
    name: str,
) -> None:
    """Run a module on two samples and on one, and compare.

    Args:
        module: Pixels to tokens, in evaluation mode.
        pixels: Of two different samples.
        tokens: d of each token that it is to give.
        name: Of the backbone, for the message.

    Raises:
        BackboneError: If it does not run, gives other shapes, no numbers, or a sample's tokens
            differ from one call to the next or with the samples beside it.
    """
    alone, together = (_run(module, pixels[:n], tokens=tokens, name=name) for n in (1, 2))
    for token in tokens:
        if not bool(together[token].isfinite().all()):
            raise BackboneError(
                f"{name} gives NaN or infinity as {token} of a random image: are its weights whole?"
            )
        if _differ(alone[token], together[token][:1]):
            again = _run(module, pixels[:1], tokens=tokens, name=name)
            raise BackboneError(_refusal(name, at_random=_differ(alone[token], again[token])))


def _run(
    module: nn.Module, pixels: Tensor, *, tokens: Mapping[str, int], name: str
) -> dict[str, Float[Tensor, "s d"]]:
    count, sample = len(pixels), tuple(pixels.shape[1:])
    try:
        with torch.inference_mode():
            given = dict(module(pixels))
            shapes = {token: tuple(values.shape) for token, values in given.items()}
    except BackboneError:
        raise
    except Exception as error:  # a network's errors are up to its author
        fact = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise BackboneError(
            f"{name} does not run on {count} samples of {sample}: {fact}. It must take any number "
            "of samples of the size that is stated for it (a program is exported with a first axis "
            "of any length: torch.export.Dim)"
        ) from error
    stated = {token: (count, d) for token, d in tokens.items()}
    if shapes != stated:
        raise BackboneError(
            f"{name} gives {shapes} for {count} samples of {sample}, and is stated to give {stated}"
        )
    return given


def _differ(one: Tensor, other: Tensor) -> bool:
    size = float(torch.linalg.vector_norm(other.float()))
    return not float(torch.linalg.vector_norm(one.float() - other.float())) <= TOLERANCE * size


def _refusal(name: str, *, at_random: bool) -> str:
    if at_random:
        return (
            f"{name} gives other tokens each time that it sees the same image: it draws at random "
            "where it should not (masking, dropout), and its embeddings would not be repeatable. "
            "Switch that off in its configuration, or before it is saved"
        )
    return (
        f"{name} gives other tokens of an image when another one is beside it in the batch: it "
        "mixes images (batch statistics, quantisation by the batch), and its embeddings would "
        "depend on how they are packed. Save it in evaluation mode"
    )
