"""Turn prompts into text rows, exactly as Wan does it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.encoder_configs import encoder_fields
from ..core.json_file import check_no_pointer, read_json
from .parts import load_part, text_encoder_part


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
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int = 512,
        fields: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> TextEncoder:
        """Read `text_encoder/` and `tokenizer/` of a checkpoint folder; ValueError names what does not fit.

        fields: the config's, by `encoder_fields`; tokenizer: by `load_tokenizer`; where they have been read already.
        """
        if fields is None:
            fields = encoder_fields("text_encoder", read_json(folder / "text_encoder" / "config.json"))
        model: Any = load_part(text_encoder_part(fields), folder / "text_encoder", device=device, dtype=dtype)
        # The module is the same; its weight may have been replaced for one owner.
        model.set_input_embeddings(model.shared)
        return cls(model, tokenizer or load_tokenizer(folder, model.config.vocab_size), max_tokens)

    def count_cut(self, prompt: str) -> int:
        """Return the number of a prompt's tokens beyond `max_tokens`, which `encode` drops as the reference does."""
        return max(0, len(self.tokenizer(clean_prompt(prompt), verbose=False).input_ids) - self.max_tokens)

    def encode(self, prompt: str) -> Tensor:
        """Return rows [n, text_dim] of a prompt's n <= `max_tokens` tokens, without padding, on the encoder's device.

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


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Read `tokenizer/` of a checkpoint folder, by transformers; ValueError says what is missing or does not fit.

    vocab_size: the text encoder's, which has a row for each token.
    """
    import transformers

    part = folder / "tokenizer"
    if not part.is_dir():
        raise ValueError("tokenizer is missing: the folder has none")
    for path in sorted(part.glob("*")):
        check_no_pointer(path, f"tokenizer/{path.name}")
    if not (part / "tokenizer.json").is_file():
        _check_pieces(part)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(part, local_files_only=True, trust_remote_code=False)
        tokenizer("a", max_length=8, truncation=True, return_tensors="pt")
        highest = max(tokenizer.get_vocab().values())
    except Exception as error:  # transformers lets through whatever its parsers stumble over
        raise ValueError(f"tokenizer cannot be read: {first_line(error)}") from error
    if highest >= vocab_size:
        raise ValueError(f"tokenizer must have ids below the text encoder's vocab_size = {vocab_size}, got {highest}")
    return tokenizer


def _check_pieces(part: Path) -> None:
    """Raise ValueError unless a SentencePiece model and its reader are there; transformers names another package."""
    pieces = next((path.name for path in sorted(part.glob("*.model"))), None)
    if pieces is None:
        raise ValueError("tokenizer has neither tokenizer.json nor spiece.model")
    if missing := [package for package in ("sentencepiece", "google.protobuf") if _is_missing(package)]:
        package = {"google.protobuf": "protobuf"}.get(missing[0], missing[0])
        raise ValueError(
            f"tokenizer/{pieces} needs the package {package}, since there is no tokenizer.json: pip install {package}"
        )


def _is_missing(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ModuleNotFoundError:  # of the package around it
        return True


def first_line(error: BaseException) -> str:
    """Return an error's message in one line that is never empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
