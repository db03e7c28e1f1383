"""How far a clip is from another one: no pretrained network, uint8 frames [F, H, W, 3] straight from the decoder.

Those that need a pretrained network are the extra `quality`'s, and Missing where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .harness import Missing

Clip = NDArray[np.uint8]
Metric = Callable[[Clip, Clip], float]
CAP_DB = 100.0  # of equal clips
LEAST_FLICKER = 0.01  # of 255: what stands still flickers by at least this, so that a ratio to it is finite
ROUNDING = 1 / 12  # variance of rounding to whole levels
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
UNITS = {
    "psnr_pooled": "dB",
    "psnr_mean": "dB",
    "psnr_worst": "dB",
    "psnr_motion": "dB",
    "ssim_mean": "ssim",
    "ssim_p5": "ssim",
    "flicker": "x",
    "spectrum": "dB",
}


def compare_clips(clip: Clip, reference: Clip) -> dict[str, float]:
    """All of the metrics below, in UNITS' order.

    psnr_pooled: of the whole clip's mean squared error; psnr_mean, psnr_worst: of frames (the mean is never below the
    pooled one, and papers report either); psnr_motion: of the differences of neighbouring frames; ssim_mean, ssim_p5:
    of frames; flicker: the clip's over the reference's, 1 where it is as steady; spectrum: see `spectrum_distance`.
    """
    a, b = clip.astype(np.float64), reference.astype(np.float64)
    frames = [psnr(x, y) for x, y in zip(a, b, strict=True)]
    similarities = ssim(clip, reference)
    return {
        "psnr_pooled": psnr(a, b),
        "psnr_mean": float(np.mean(frames)),
        "psnr_worst": min(frames),
        "psnr_motion": psnr(np.diff(a, axis=0), np.diff(b, axis=0)) if len(a) > 1 else CAP_DB,
        "ssim_mean": float(np.mean(similarities)),
        "ssim_p5": float(np.percentile(similarities, 5)),
        "flicker": max(flicker(clip), LEAST_FLICKER) / max(flicker(reference), LEAST_FLICKER),
        "spectrum": spectrum_distance(clip, reference),
    }


def psnr(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """dB, 255 the peak."""
    error = float(np.mean((a - b) ** 2))
    return CAP_DB if error == 0 else min(CAP_DB, 10 * float(np.log10(255**2 / error)))


def ssim(clip: Clip, reference: Clip) -> NDArray[np.float64]:
    """Structural similarity of each frame, over channels, 11 x 11 Gaussian windows (Wang et al., 2004)."""
    x, y = (torch.tensor(frames).permute(0, 3, 1, 2).double() for frames in (clip, reference))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3)).numpy()


def _blur(x: Tensor) -> Tensor:
    """Along rows, then along columns, as sums of slices: in all, 10 times faster than a grouped convolution in fp64."""
    position = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-(position**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    for dim in (-1, -2):
        length = x.shape[dim] - len(weights) + 1
        x = torch.stack([weight * x.narrow(dim, i, length) for i, weight in enumerate(weights)]).sum(0)
    return x


def flicker(clip: Clip) -> float:
    """Mean absolute second difference over time, in levels of 255: steady motion and steady light have little of it.

    0 with fewer than 3 frames. Mean |x[t+1] - 2 x[t] + x[t-1]| over pixels and channels; source: none, it is the
    discrete second derivative.
    """
    return float(np.abs(np.diff(clip.astype(np.float64), n=2, axis=0)).mean()) if len(clip) > 2 else 0.0


def spectrum_distance(clip: Clip, reference: Clip) -> float:
    """Root mean square over spatial frequencies of the two radial power spectra's difference in dB.

    Blur shows here where PSNR forgives it: power that is missing at high frequencies.
    """
    apart = 10 * (np.log10(radial_spectrum(clip)) - np.log10(radial_spectrum(reference)))
    return float(np.sqrt(np.mean(apart**2)))


def radial_spectrum(clip: Clip) -> NDArray[np.float64]:
    """Mean power of luma at each distance from frequency 0, over angles and frames (Durall et al., arXiv 2003.01826).

    Index i: distances that round to i + 1 cycles a frame's shorter side, up to half of its pixels; no mean.
    The power of rounding to whole levels is added everywhere: nothing is said of what lies below it.
    """
    luma = clip.astype(np.float64) @ np.array(LUMA)
    height, width = luma.shape[1:]
    power = (np.abs(np.fft.fft2(luma)) ** 2).mean(axis=0) / (height * width) + ROUNDING
    side = min(height, width)
    rows, columns = np.fft.fftfreq(height, 1 / side), np.fft.fftfreq(width, 1 / side)
    rings = np.rint(np.hypot(rows[:, None], columns[None, :])).astype(int)
    inside = (rings >= 1) & (rings <= side // 2)
    sums = np.bincount(rings[inside], weights=power[inside])[1:]
    return np.asarray(sums / np.bincount(rings[inside])[1:], dtype=np.float64)


def lpips() -> Metric:
    """Learned perceptual distance (Zhang et al., 2018, AlexNet), the mean over frames; 0 of equal clips.

    Missing where the extra `quality` is not installed. Its weights are fetched when it is first made.
    """
    try:
        import lpips as package
    except ImportError as error:
        raise Missing("lpips is not installed (pip install 'skylapse[quality]'; it needs torchvision)") from error
    network: Any = package.LPIPS(net="alex", verbose=False)

    @torch.inference_mode()
    def distance(clip: Clip, reference: Clip) -> float:
        a, b = (torch.tensor(frames).permute(0, 3, 1, 2).float() / 127.5 - 1 for frames in (clip, reference))
        return float(network(a, b).mean())

    return distance


EXTRA: dict[str, tuple[str, Callable[[], Metric]]] = {"lpips": ("lpips", lpips)}  # name -> its unit, what makes it
