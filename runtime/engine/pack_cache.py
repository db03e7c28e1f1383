"""Which requests' sequences lie where in a pack, kept from step to step while the same requests stay together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..core.device import LAYOUT_BYTES
from ..layers.pack import Pack, build_pack
from ..layers.pack import Sequence as PackSequence
from ..layers.time_embedding import TimeEmbeddings
from ..models.model import Model
from .trajectory import Trajectory

Place = tuple[int, int]  # (ticket, branch)


@dataclass(frozen=True)
class Layout:
    """A pack and whose its sequences are; those of one shape are neighbours, so that they share attention calls."""

    pack: Pack
    order: tuple[Place, ...]

    @property
    def num_bytes(self) -> int:
        contexts = [self.pack.text, *([self.pack.image] if self.pack.image else [])]
        of_tokens = self.pack.rotation.nbytes + self.pack.modulation_ids.nbytes
        return of_tokens + sum(context.keys_values.nbytes for context in contexts)

    def split(self, tokens: Tensor) -> dict[Place, Tensor]:
        """Tokens [N, dim] -> each sequence's [n, dim], as views."""
        lengths = [stop - start for start, stop in pairwise(self.pack.cu_seqlens)]
        return dict(zip(self.order, tokens.split(lengths), strict=True))


class Layouts:
    """The layouts of the last steps, within a budget of bytes; the least recently used leave first.

    time_embeddings: of the packs' timesteps, which recur from request to request.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.time_embeddings = TimeEmbeddings(model)
        self._layouts: OrderedDict[tuple[tuple[int, ...], ...], Layout] = OrderedDict()

    def get(self, members: Sequence[Trajectory], modulations: Sequence[tuple[int, int]]) -> Layout:
        """modulations: for each member, where in the pack's timesteps its own lies and that of clean frames."""
        key = tuple(
            (t.ticket, t.plan.expert, t.plan.num_branches, *ids) for t, ids in zip(members, modulations, strict=True)
        )
        if key not in self._layouts:
            self._layouts[key] = self._build(members, modulations)
            while len(self._layouts) > 1 and sum(layout.num_bytes for layout in self._layouts.values()) > LAYOUT_BYTES:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        return self._layouts[key]

    def forget(self, ticket: int) -> None:
        """Drop every pack that holds something of this request."""
        for key in [key for key in self._layouts if any(member[0] == ticket for member in key)]:
            del self._layouts[key]

    def __len__(self) -> int:
        return len(self._layouts)

    def _build(self, members: Sequence[Trajectory], modulations: Sequence[tuple[int, int]]) -> Layout:
        sequences = []
        for t, (own, clean) in zip(members, modulations, strict=True):
            frames = tuple(clean if given else own for given in t.frame_is_given)
            branches = t.branches()
            for place, text in zip(t.places, branches.texts, strict=True):
                sequences.append((place, PackSequence(t.grid, frames, text, branches.image)))
        sequences.sort(key=lambda item: (item[1].grid, len(item[1].text.key_bias)))
        head_dim = self.model.experts[0].config.attention_head_dim
        pack = build_pack([sequence for _, sequence in sequences], head_dim, self.model.device)
        return Layout(pack, tuple(place for place, _ in sequences))
