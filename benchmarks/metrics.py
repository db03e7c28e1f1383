"""How far a clip is from another one: no pretrained network, uint8 frames [F, H, W, 3] straight from the decoder."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Clip = NDArray[np.uint8]
CAP_DB = 100.0  # of equal clips


def compare_clips(clip: Clip, reference: Clip) -> dict[str, float]:
    """All of the metrics below.

    psnr_pooled: of the whole clip's mean squared error; psnr_mean, psnr_worst: of frames (the mean is never below the
    pooled one, and papers report either); psnr_motion: of the differences of neighbouring frames; ssim_mean, ssim_p5.
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
    position = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-(position**2) / (2 * 1.5**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 11, 11), groups=x.shape[1])
