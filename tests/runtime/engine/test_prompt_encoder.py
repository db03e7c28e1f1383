"""Prompts are encoded before the first step, each of them once, whatever experts and guidance the steps have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Recorder, engine_of, small_request

from skylapse import Engine
from skylapse.runtime.engine import batch, denoise
from skylapse.runtime.models.text_cache import TextCache
from skylapse.runtime.models.text_encoder import TextEncoder

PROMPTS = ["a star", "a box"]


class Calls:
    """Counts the prompts that are encoded and the keys that experts make of them, inside steps and before them."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded: list[str] = []
        self.in_steps = self.keys_in_steps = 0
        self._steps = False
        encode = TextEncoder.encode

        def counted(encoder: TextEncoder, prompt: str) -> torch.Tensor:
            self.encoded.append(prompt)
            self.in_steps += self._steps
            return encode(encoder, prompt)

        monkeypatch.setattr(TextEncoder, "encode", counted)
        monkeypatch.setattr(batch, "evaluate", self._step(denoise.evaluate))
        for expert in engine.model.experts:
            monkeypatch.setattr(expert, "encode_text", self._keys(expert.encode_text))

    def _step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            self._steps = True
            try:
                return function(*arguments)
            finally:
                self._steps = False

        return step

    def _keys(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def keys(rows: torch.Tensor) -> Any:
            self.keys_in_steps += self._steps
            return function(rows)

        return keys


@pytest.mark.parametrize("interval", [None, (0.3, 0.9)], ids=["guided", "guided now and then"])
@pytest.mark.parametrize("variant", ["wan2.1-t2v", "wan2.2-t2v-a14b"])
def test_a_prompt_is_encoded_once_and_never_inside_a_step(
    variant: str, interval: tuple[float, float] | None, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Recorder(engine_of(folders[variant]))
    calls = Calls(together.engine, monkeypatch)
    ticket = together.engine.submit(small_request(negative_prompt="a box", guidance_interval=interval))
    together.run()
    plans = together.trajectories[ticket].plans
    assert len({(plan.expert, plan.num_branches) for plan in plans}) >= (1 if variant == "wan2.1-t2v" else 2)
    assert calls.encoded == PROMPTS and calls.in_steps == calls.keys_in_steps == 0


def test_what_the_cache_let_go_is_made_of_kept_rows(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    request = small_request(negative_prompt="a box", guidance_interval=(0.3, 0.9))
    expected = engine_of(folders["wan2.2-t2v-a14b"]).generate_latents(request)
    together = Recorder(engine_of(folders["wan2.2-t2v-a14b"]))
    together.engine.text_cache = TextCache(0)
    calls = Calls(together.engine, monkeypatch)
    ticket = together.engine.submit(request)
    together.run()
    assert calls.encoded == PROMPTS and calls.in_steps == 0 and calls.keys_in_steps > 0
    assert torch.equal(together.latents(ticket), expected)


def test_an_unguided_request_has_its_negative_prompt_not_encoded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(folders["wan2.1-t2v"])
    calls = Calls(engine, monkeypatch)
    engine.generate(small_request(negative_prompt="a box", guidance_scale=1.0))
    assert calls.encoded == ["a star"]


def test_each_prompt_is_a_work_item_unless_another_request_had_it_encoded(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["wan2.1-t2v"])
    items = []
    for prompt in PROMPTS:
        t = engine.prepare(small_request(prompt=prompt, negative_prompt="blurred"))
        while t.stage == "encode":
            t.work()
            items.append(len(t.branch_encoder.rows))
    assert items == [1, 2, 2]


def test_a_resumed_request_has_its_prompts_encoded_before_its_next_step(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine_of(folders["wan2.2-t2v-a14b"])
    first.submit(small_request(negative_prompt="a box"), checkpoint_every=3, checkpoint_dir=tmp_path)
    while not (tmp_path / "state.json").exists():
        first.step()
    engine = engine_of(folders["wan2.2-t2v-a14b"])
    calls = Calls(engine, monkeypatch)
    engine.resume(tmp_path)
    while engine.has_work():
        engine.step()
    assert calls.encoded == PROMPTS and calls.in_steps == calls.keys_in_steps == 0


def test_rows_and_contexts_are_counted(folders: dict[str, Path]) -> None:
    t = engine_of(folders["wan2.2-t2v-a14b"]).prepare(small_request(negative_prompt="a box"))
    empty = t.num_bytes
    while t.stage == "encode":
        t.work()
    texts = t.branches().texts
    assert t.latents is not None
    counted = t.num_bytes - empty - t.latents.nbytes
    assert counted == sum(part.nbytes for part in (*t.branch_encoder.rows.values(), *texts)) > 0


def test_what_is_cut_off_a_prompt_is_told_once_a_request(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(folders["wan2.2-t2v-a14b"])
    limit = engine.limits.max_prompt_tokens
    assert engine.model.text_encoder.max_tokens == limit
    fits = " ".join(["star"] * (limit - 1))  # and the end token
    for num_warnings, prompt in enumerate((fits, fits + " star" * 7, fits + " star" * 7)):  # the third is in the cache
        t = engine.prepare(small_request(prompt=prompt, guidance_interval=(0.3, 0.9)))
        while t.stage == "encode":
            t.work()
        assert len(t.branch_encoder.rows[prompt]) == limit
        told = [record.getMessage() for record in caplog.records]
        assert told == [f"the last 7 tokens of a prompt are cut off: the model reads {limit}"] * num_warnings


def test_a_video_tells_what_was_cut_off_its_prompts(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["wan2.1-t2v"])
    too_long = " ".join(["star"] * (engine.limits.max_prompt_tokens + 1))  # and the end token
    for prompts, cut in (
        (dict(), {}),
        (dict(negative_prompt=too_long), {"negative_prompt": 2}),
        (dict(prompt=too_long, negative_prompt=too_long + " star"), {"prompt": 2, "negative_prompt": 3}),
        (dict(negative_prompt=too_long, guidance_scale=1.0), {}),  # nothing is guided away from, so it is not read
    ):
        video = engine.generate(small_request(**prompts, num_inference_steps=2))
        assert video.metadata.cut_tokens == cut
