"""What a request's sequences attend to: its prompts, and its images where the checkpoint shows them to every block.

The text encoder works before the first step and on each prompt once. Its rows stay with the request; the keys and
values that an expert makes of them are shared through the text cache, and made again from the rows if it let them go.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..checkpoints.registry import EXPERTS
from ..core.request import VideoRequest
from ..families.wan.denoiser import WanDenoiser
from ..layers.pack import TextContext
from ..models.model import Model
from ..models.text_cache import TextCache
from .step_plan import StepPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Branches:
    """What they attend to while expert and guidance stay the same."""

    texts: tuple[TextContext, ...]  # the prompt's, then the negative prompt's
    image: Tensor | None  # [num_layers, 2, L, H, D]

    @property
    def num_bytes(self) -> int:
        return sum(text.nbytes for text in self.texts) + (0 if self.image is None else self.image.nbytes)


class BranchEncoder:
    """Of one request: encodes what all of its steps need, then gives each step its own."""

    def __init__(self, model: Model, request: VideoRequest, plans: Sequence[StepPlan], cache: TextCache) -> None:
        self.model, self.cache = model, cache
        self.prompts = (request.prompt, request.negative_prompt)
        self.rows: dict[str, Tensor] = {}  # [n, text_dim] of each prompt, the text encoder's
        self.cut_tokens: dict[str, int] = {}  # prompt, negative_prompt -> how many it has beyond what the model reads
        self.image_rows: Tensor | None = None  # [L, image_dim], the image encoder's
        shown = {(prompt, plan.expert): None for plan in plans for prompt in self.prompts[: plan.num_branches]}
        self._experts = {prompt: [expert for own, expert in shown if own == prompt] for prompt, _ in shown}
        self._held: tuple[tuple[int, int], Branches] | None = None

    @property
    def needs_text(self) -> bool:
        """Whether the text encoder still has to see a prompt that some step shows the model."""
        return len(self.rows) < len(self._experts)

    @property
    def num_bytes(self) -> int:
        """Of what stays with the request whatever the text cache lets go."""
        rows = sum(part.nbytes for part in (*self.rows.values(), self.image_rows) if part is not None)
        return rows + (0 if self._held is None else self._held[1].num_bytes)

    def encode_text(self) -> Iterator[None]:
        """One prompt a work item, for every expert that some step shows it to; what others had encoded costs none."""
        for prompt, experts in self._experts.items():
            key = ("rows", prompt)
            if self.rows and key not in self.cache:
                yield
            if num_cut := self.model.text_encoder.count_cut(prompt):
                name = "prompt" if prompt == self.prompts[0] else "negative_prompt"
                self.cut_tokens[name] = num_cut
                limit = self.model.text_encoder.max_tokens
                logger.warning("the last %d tokens of a %s are cut off: the model reads %d", num_cut, name, limit)
            self.rows[prompt] = self.cache.get(key, partial(self._rows, prompt))
            for expert in experts:
                if self.model.residency.is_on_device(EXPERTS[expert]):  # else when it is: nothing moves for a prompt
                    self._text(expert, prompt)

    def at(self, plan: StepPlan) -> Branches:
        """Of a step; kept until a step needs others."""
        key = (plan.expert, plan.num_branches)
        if self._held is None or self._held[0] != key:
            texts = tuple(self._text(plan.expert, prompt) for prompt in self.prompts[: plan.num_branches])
            self._held = key, Branches(texts, self._image(plan.expert))
        return self._held[1]

    def _rows(self, prompt: str) -> Tensor:
        self.model.residency.require("text_encoder")
        return self.model.text_encoder.encode(prompt)

    def _text(self, expert: int, prompt: str) -> TextContext:
        return self.cache.get((f"expert {expert}", prompt), lambda: self._expert(expert).encode_text(self.rows[prompt]))

    def _image(self, expert: int) -> Tensor | None:
        if self.image_rows is None:
            return None
        if self._held is not None and self._held[0][0] == expert:
            return self._held[1].image  # guidance has begun or ended, and the expert is the same
        return self._expert(expert).encode_image(self.image_rows)

    def _expert(self, expert: int) -> WanDenoiser:
        self.model.residency.require(EXPERTS[expert])
        return self.model.experts[expert]
