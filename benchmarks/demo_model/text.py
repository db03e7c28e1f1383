"""The demo model's tokenizer and text encoder: a word list and a small UMT5."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .scenes import vocabulary

TEXT_DIM = 64
SPECIAL = ("<pad>", "</s>", "<unk>")
# Words that prompts use around the grammar; they carry no meaning in training, so the model learns to ignore them.
FILLERS = (
    "an",
    "the",
    "of",
    "is",
    "and",
    "with",
    "video",
    "slowly",
    "please",
    "clip",
    "colored",
    "shape",
    "that",
    ",",
    ".",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower case, `</s>` at the end as T5 has it; unknown words share one token."""
    words = list(dict.fromkeys((*SPECIAL, *vocabulary(), *FILLERS)))  # each once: ids are below their number
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two layers of UMT5, random weights."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
