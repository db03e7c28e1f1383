"""The text encoder is what transformers makes of its folder, without a copy of it on the way."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import ftfy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from skylapse.runtime.models.parts import EMBED_TOKENS, SHARED
from skylapse.runtime.models.text_encoder import TextEncoder, clean_prompt

CPU = torch.device("cpu")
PROMPT = "a large red circle moving left at night"


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path) -> Path:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(demo_folder / part, tmp_path / part)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("names", [(SHARED,), (EMBED_TOKENS,), (SHARED, EMBED_TOKENS)], ids=["first", "second", "both"])
def test_rows_equal_those_of_the_model_that_transformers_loads(
    names: tuple[str, ...], dtype: torch.dtype, folder: Path
) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    embedding = next(tensors.pop(name) for name in (SHARED, EMBED_TOKENS) if name in tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name != EMBED_TOKENS}
    save_file(tensors | {name: embedding.clone() for name in names}, path, {"format": "pt"})
    encoder = TextEncoder.load(folder, device=CPU, dtype=dtype)
    reference = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    assert {p.dtype for p in encoder.model.parameters()} == {dtype} and not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    expected = TextEncoder(reference, encoder.tokenizer, 512).encode(PROMPT)
    assert torch.equal(encoder.encode(PROMPT), expected)


def test_no_second_copy_is_made_and_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("a copy is made"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args, **kwargs: pytest.fail("a copy is moved"))
    encoder = TextEncoder.load(folder, device=CPU, dtype=torch.float32)
    assert {p.device for p in encoder.model.parameters()} == {CPU}
    assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight


def test_what_does_not_fit_is_named(folder: Path) -> None:
    config = folder / "text_encoder" / "config.json"
    given = json.loads(config.read_text())
    config.write_text(json.dumps(given | {"d_ff": given["d_ff"] + 8}))
    with pytest.raises(
        ValueError, match=r"checkpoint text_encoder does not fit its config; wrong shape: encoder\.block"
    ):
        TextEncoder.load(folder, device=CPU, dtype=torch.float32)
    config.write_text(json.dumps(given | {"num_heads": "many"}))
    with pytest.raises(ValueError, match=r"text_encoder/config\.json: num_heads must be a whole number"):
        TextEncoder.load(folder, device=CPU, dtype=torch.float32)


def test_prompt_of_plain_words_is_left_as_ftfy_would_leave_it() -> None:
    """ftfy is asked only where there may be something to mend, so a machine without it takes plain prompts."""
    rng = random.Random(0)
    plain = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    for prompt in ("".join(rng.choices(plain, k=rng.randrange(1, 60))) for _ in range(500)):
        assert clean_prompt(prompt) == " ".join(ftfy.fix_text(prompt).split())


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("a cafÃ© at night", "a café at night"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("two\nlines\tand a tab", "two lines and a tab"),
        ("“quoted”", '"quoted"'),
    ],
)
def test_prompt_is_mended_as_the_reference_does(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned
