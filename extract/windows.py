"""Windows: HU of a scan to channels in 0..1, on whatever device the HU lie on.

Sec. 3.1 of the paper: every slice is seen through three HU windows, one a channel, each clipped
and scaled to 0..1. A backbone's resize and normalisation come after (`ctfm.extract.backbone`).
The intensity part of an augmented view is applied here too, because it is defined on channels;
its geometric part belongs to `ctfm.extract.augment`.

Axes: s slices (of a volume too), m window channels, y rows, x columns.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from ctfm.extract.augment import Jitter


def to_channels(
    hu: Int16[Tensor, "s y x"] | Float[Tensor, "s y x"],
    windows_hu: Sequence[tuple[float, float]],
    *,
    own_window: bool = False,
    jitter: Jitter | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "s m y x"]:
    """Cut slices into window channels: clip((hu − low) / (high − low), 0, 1).

    Args:
        hu: Slices of one scan, in HU.
        windows_hu: (low, high) of each channel, low < high.
        own_window: Add a last channel: from the least to the greatest HU of all these slices.
        jitter: Brightness and noise of an augmented view, applied to the channels, which are
            clipped to 0..1 again: no backbone was trained on values outside its range.
        dtype: Of the result; the arithmetic is float32.

    Returns:
        Channels on the device of `hu`.
    """
    bounds_hu = torch.tensor(list(windows_hu), device=hu.device, dtype=torch.float32)
    if own_window:
        own_hu = torch.stack(hu.aminmax()).to(torch.float32)
        bounds_hu = torch.cat([bounds_hu, own_hu[None]])
    low = bounds_hu[:, 0, None, None]
    width = (bounds_hu[:, 1, None, None] - low).clamp_min_(1e-8)  # a constant scan has none
    channels = (hu[:, None].to(torch.float32) - low).div_(width).clamp_(0.0, 1.0)
    if jitter is not None:
        channels.mul_(jitter.brightness).add_(noise_like(channels, jitter)).clamp_(0.0, 1.0)
    return channels.to(dtype)


def fit_to(
    hu: Int16[Tensor, "z y x"] | Float[Tensor, "z y x"], shape: Sequence[int], *, fill: float
) -> Float[Tensor, "z2 y2 x2"]:
    """Pad or crop a volume about its middle; where a difference is odd, more at the far end.

    Args:
        hu: In HU.
        shape: (z, y, x) of the result.
        fill: What is put where the volume does not reach, in HU.
    """
    fitted = torch.full(tuple(shape), fill, device=hu.device)
    to, of = [], []
    for new, old in zip(shape, hu.shape, strict=True):
        common = min(new, old)
        to.append(slice((new - common) // 2, (new - common) // 2 + common))
        of.append(slice((old - common) // 2, (old - common) // 2 + common))
    fitted[tuple(to)] = hu[tuple(of)].to(fitted.dtype)
    return fitted


def jitter_hu(
    hu: Float[Tensor, "s 1 y x"], jitter: Jitter, *, window_hu: tuple[float, float]
) -> Float[Tensor, "s 1 y x"]:
    """Jitter HU themselves, for a backbone that takes HU in place of windows.

    Brightness scales HU from the lower end of the window; the noise is `jitter.noise_sd` of the
    width of the window, so that it looks the same through that window as in `to_channels`.
    """
    low, high = window_hu
    noise = noise_like(hu, jitter).mul_(high - low)
    return ((hu - low) * jitter.brightness + low).add_(noise)


def noise_like(like: Float[Tensor, "*shape"], jitter: Jitter) -> Float[Tensor, "*shape"]:
    """Gaussian noise of the jitter's seed and standard deviation, the same on every device."""
    # Generators of two devices give other numbers for one seed, so the CPU's is always used.
    generator = torch.Generator().manual_seed(jitter.seed)
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return noise.mul_(jitter.noise_sd).to(like.device, like.dtype)
