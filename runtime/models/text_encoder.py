"""Prompts -> text rows, exactly as Wan does it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..json_file import read_json
from .checkpoint import load_weights, tensor_headers

STEM = "model"  # of its safetensors files
ARCHITECTURES = ("UMT5EncoderModel", "T5EncoderModel")
# One parameter; published checkpoints hold it under one of the names or under both.
SHARED, EMBED_TOKENS = "shared.weight", "encoder.embed_tokens.weight"


def clean_prompt(prompt: str) -> str:
    """Mend mojibake, undo HTML entities (twice), collapse white space; the reference's cleaning, in its order."""
    if not (prompt.isascii() and prompt.isprintable() and "&" not in prompt):  # else it has nothing to mend
        import ftfy

        prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(prompt.split())


class TextEncoder:
    """A T5-family encoder with its tokenizer, both read by transformers."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype, max_tokens: int = 512) -> TextEncoder:
        """Read `text_encoder/` and `tokenizer/` of a checkpoint folder; ValueError names what does not fit."""
        import transformers

        names = read_json(folder / "text_encoder" / "config.json").get("architectures") or [None]
        if names[0] not in ARCHITECTURES:
            raise ValueError(f"text_encoder must be {' or '.join(ARCHITECTURES)}, got {names[0]}")
        model = load_encoder(getattr(transformers, names[0]), folder / "text_encoder", device=device, dtype=dtype)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"tokenizer cannot be read: {_first_line(error)}") from error
        return cls(model, tokenizer, max_tokens)

    def count_cut(self, prompt: str) -> int:
        """How many of a prompt's tokens lie beyond `max_tokens`, which `encode` leaves out as the reference does."""
        return max(0, len(self.tokenizer(clean_prompt(prompt), verbose=False).input_ids) - self.max_tokens)

    def encode(self, prompt: str) -> Tensor:
        """Rows [n, text_dim] of a prompt's n <= `max_tokens` tokens, without padding, on the encoder's device.

        The reference runs the encoder on 512 masked positions and then zeroes the padding; the real rows do not see
        it, so the padding is left out here (relative position biases make this exact) and folded by the denoiser.
        """
        ids = self.tokenizer(
            clean_prompt(prompt),
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
            add_special_tokens=True,
        ).input_ids
        with torch.inference_mode():
            rows: Tensor = self.model(ids.to(self.model.device)).last_hidden_state[0]
        return rows


def load_encoder(model_class: Any, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' module, filled tensor by tensor on its device.

    Its `from_pretrained` makes the whole of it in the machine's memory first (11 GB for UMT5-XXL), or needs accelerate.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = model_class(config)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{folder.name}/config.json cannot be read: {_first_line(error)}") from error
    model.set_input_embeddings(model.shared)
    names = {name for name, _, _ in tensor_headers(folder, STEM)}
    load_weights(
        model,
        folder,
        device=device,
        dtype=dtype,
        stem=STEM,
        unexpected_keys=(EMBED_TOKENS, "decoder."),
        rename=lambda name: EMBED_TOKENS if name == SHARED and SHARED not in names else name,
    )
    model.set_input_embeddings(model.shared)  # the module is the same; its weight may have been replaced for one owner
    return model


def load_transformers_model(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model from safetensors alone; ValueError names missing, unexpected or mismatched keys."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar a component says nothing to who waits for a video
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder.name} cannot be read: {_first_line(error)}") from error
    except Exception as error:  # safetensors' own error type derives from Exception alone
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{folder.name} cannot be read: {_first_line(error)}") from error
    problems = {
        what: sorted(str(key) for key in report.get(f"{what}_keys", ()))
        for what in ("missing", "unexpected", "mismatched")
    }
    found = "; ".join(f"{what}: {', '.join(keys[:5])}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"{folder.name} does not fit its config; {found}")
    return model.requires_grad_(False).eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
