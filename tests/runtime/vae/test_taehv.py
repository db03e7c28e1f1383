"""A tiny distilled decoder: the published function under the published names, streamed, exported, and as previews."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from coded_clips import clip, coded
from safetensors.torch import save_file
from tiny import VAE_21, draw_weights
from torch import Tensor

from skylapse import Engine, VideoRequest
from skylapse.compile.onnxruntime import OnnxRuntime
from skylapse.compile.stream import Plan
from skylapse.runtime.core.config import load_settings
from skylapse.runtime.core.events import Preview
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.preview import SCALE, TinyPreviewer
from skylapse.runtime.vae.taehv import TinyDecoder, load_tiny_decoder, tiny_decoder_of
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

CPU = torch.device("cpu")
MEAN, STD = [0.1, -0.2, 0.3, 0.0], [1.5, 0.7, 1.1, 2.0]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def codec() -> VideoCodec:
    config = WanVAEConfig(**VAE_21, latents_mean=MEAN, latents_std=STD)
    return VideoCodec(WanVAE(config).requires_grad_(False), device=CPU, chunk=2)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A file as the original is stored: its names, fp16, an encoder beside the decoder."""

    def file(name: str = "tiny.safetensors", channels: int = 4, strides: tuple = (1, 2, 2), **more: Tensor) -> Path:
        decoder = TinyDecoder(channels, (16, 8, 8, 8), strides, 1, torch.zeros(1), torch.ones(1))
        drawn = {key: 0.6 * t for key, t in draw_weights(decoder, 0).state_dict().items() if key.startswith("dec")}
        drawn |= {"decoder.22.weight": 2.0 * drawn["decoder.22.weight"], "decoder.22.bias": torch.full((3,), 0.5)}
        tensors = {key: tensor.half() for key, tensor in drawn.items()}
        save_file(tensors | {"encoder.0.weight": torch.zeros(3)} | more, tmp_path / name)
        return tmp_path / name

    return file


def published(weights: dict[str, Tensor], z: Tensor) -> Tensor:
    """The decoder as its authors wrote it, of a whole clip: normalised latents [T, C, h, w] to frames in [0, 1]."""

    def conv(name: str, x: Tensor, padding: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    x = conv("decoder.1", torch.tanh(z / 3) * 3).relu()
    for index in range(3, 21):
        name = f"decoder.{index}"
        if f"{name}.conv.0.weight" in weights:
            y = torch.cat([x, F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[: len(x)]], 1)
            x = (conv(f"{name}.conv.4", conv(f"{name}.conv.2", conv(f"{name}.conv.0", y).relu()).relu()) + x).relu()
        elif f"{name}.conv.weight" in weights:
            _, channels, h, w = x.shape
            x = conv(f"{name}.conv", x, padding=0).reshape(-1, channels, h, w)
        elif f"{name}.weight" in weights:
            x = conv(name, x)
        else:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return conv("decoder.22", x.relu()).clamp(0, 1)[3:]


@torch.inference_mode()
def test_decoder_is_the_published_one_whatever_the_chunk(codec: VideoCodec, make: Make) -> None:
    from safetensors.torch import load_file

    path = make()
    decoder = load_tiny_decoder(path, codec)
    coder = tiny_decoder_of(decoder, codec)
    x = clip(coder, 6, (4, 6))
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    expected = published(weights, (x[0].transpose(0, 1) - mean) / std) * 2 - 1
    whole = coded(coder, coder, x, 5)
    assert whole.shape == (1, 3, 21, 32, 48) and 0.1 < whole.std() < 0.6 and whole.abs().quantile(0.9) < 1
    assert (whole[0].transpose(0, 1) - expected).abs().max() < 1e-5
    for chunk in (1, 2, 3):
        assert (coded(coder, coder, x, chunk) - whole).abs().max() < 1e-5
    assert [(s.channels, s.frames, s.scale) for s in coder.states.shapes] == [
        *[(16, 1, 1)] * 3,
        *[(8, 1, 2)] * 3,
        *[(8, 1, 4)] * 3,
    ]


def test_exported_decoder_decodes_as_eager_does(codec: VideoCodec, make: Make, tmp_path: Path) -> None:
    coder = tiny_decoder_of(load_tiny_decoder(make(), codec), codec)
    backend = OnnxRuntime(CPU, threads=1)
    plan = backend.plans(Plan(size=(2, 3)))[0]
    backend.build(coder, plan, tmp_path)
    run = backend.load(coder, plan, tmp_path)
    for chunk in (3, 1):
        x = clip(coder, 5, (2, 3))
        assert (coded(run, coder, x, chunk) - coded(coder, coder, x, chunk)).abs().max() < 1e-5


def test_file_that_does_not_fit_is_told_in_a_line(codec: VideoCodec, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"makes 8 pixels and 4 frames of latents of 16 channels; the model needs 8 "):
        load_tiny_decoder(make("wide.safetensors", channels=16), codec)
    with pytest.raises(ValueError, match="makes 8 pixels and 8 frames of latents of 4"):
        load_tiny_decoder(make("long.safetensors", strides=(2, 2, 2)), codec)
    with pytest.raises(ValueError, match=r"is no TAEHV decoder: .*decoder\.23\.weight"):
        load_tiny_decoder(make("more.safetensors", **{"decoder.23.weight": torch.zeros(2)}), codec)
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is no TAEHV decoder: it has no 'decoder\.1\.weight'"):
        load_tiny_decoder(tmp_path / "other.safetensors", codec)
    (tmp_path / "torn.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tiny_decoder(tmp_path / "torn.safetensors", codec)
    (tmp_path / "pickled.pth").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"must be a \.safetensors file, got .*pickled\.pth"):
        load_tiny_decoder(tmp_path / "pickled.pth", codec)


@torch.inference_mode()
def test_previews_are_the_last_frames_of_their_groups(codec: VideoCodec, make: Make) -> None:
    decoder = load_tiny_decoder(make(), codec)
    latents = torch.randn(4, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    shown = TinyPreviewer(decoder, codec)(latents)
    assert shown.shape == (5, 4 * SCALE, 6 * SCALE, 3) and shown.std() > 20
    frames, _ = decoder((latents[None] * codec.std + codec.mean)[:, :, :1], None)
    small = F.avg_pool2d(frames[0].transpose(0, 1), 8 // SCALE).add(1).mul(127.5)[0].permute(1, 2, 0)
    assert abs(torch.tensor(shown[0]).float() - small).max() <= 0.51


def test_engine_previews_by_the_file_that_is_configured(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SKYLAPSE_PREVIEW_DECODER", str(make(channels=48)))
    engine = Engine.from_pretrained("demo", device="cpu")
    engine.submit(
        VideoRequest(prompt="a star", num_inference_steps=2, num_frames=9, guidance_scale=1.0), preview_every=2
    )
    previews = []
    while engine.has_work():
        previews += [event for event in engine.step() if isinstance(event, Preview)]
    assert isinstance(engine.previewer, TinyPreviewer)
    assert [event.frames.shape for event in previews] == [(3, 32, 32, 3)]
    monkeypatch.setenv("SKYLAPSE_PREVIEW_DECODER", str(make("narrow.safetensors")))
    with pytest.raises(ValueError, match="the model needs 8 pixels and 4 frames of latents of 48 channels"):
        Engine.from_pretrained("demo", device="cpu")
    with pytest.raises(ValueError, match="SKYLAPSE_PREVIEW_DECODER must be a file, got 'nowhere'"):
        load_settings({"SKYLAPSE_PREVIEW_DECODER": "nowhere"})
