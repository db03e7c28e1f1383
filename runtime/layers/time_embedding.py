"""Embeddings of the timesteps that packs are at, kept from request to request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.tables import send
from ..core.device import TIME_EMBEDDING_BYTES
from ..models.model import Model


class TimeEmbeddings:
    """What an expert makes of a pack's timesteps, which depends on nothing else; least recently used ones leave first.

    They are plain tensors on the device: they hold no weights, and stay right while an expert's weights are elsewhere.
    """

    def __init__(self, model: Model, budget_bytes: int = TIME_EMBEDDING_BYTES) -> None:
        self.model, self.budget_bytes = model, budget_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[int, torch.dtype, tuple[float, ...]], tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, expert: int, timesteps: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Embedding [M, dim] and modulation [M, 6, dim] of M timesteps, in the expert's dtype."""
        denoiser = self.model.experts[expert]
        key = (expert, denoiser.dtype, tuple(timesteps))
        if key not in self._kept:
            sent = send(torch.tensor(timesteps), self.model.device)
            self._kept[key] = denoiser.condition_embedder.embed_time(sent, denoiser.dtype)
            self.num_bytes += _bytes(self._kept[key])
            while len(self._kept) > 1 and self.num_bytes > self.budget_bytes:
                self.num_bytes -= _bytes(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(key)
        return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)


def _bytes(tensors: tuple[Tensor, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
