"""The tokenizer of the character-level classifiers, made of `tokenizers` parts only.

Zhang, Zhao & LeCun 2015, section 2.2, read lower-cased text over an alphabet of 70 characters; a character outside it is
blank. Here it becomes the unknown token, which the character networks read as blank too.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from .tokenizers import SPECIAL_TOKENS

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+=<>()[]{}\n "
"""Letters, digits, 33 other characters and the line break as in the paper's section 2.2 (where `-` stands twice, so that
69 remain), and the space."""


def character_tokenizer(
    alphabet: str = ALPHABET, *, lowercase: bool = True, max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each character of an alphabet.

    Args:
        alphabet: the characters, in the order of their ids; the seven special tokens come before them.
        lowercase: whether texts are lower-cased first.
        max_length: characters after which `truncation=True` cuts; None for no limit.

    Returns:
        a tokenizer that stock transformers saves and loads; pads on the right.

    Raises:
        ValueError: a character occurs twice in the alphabet, or there is none.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet must hold at least one character and none twice, got {alphabet!r}")
    vocabulary = [*SPECIAL_TOKENS.values(), *alphabet]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        **({"model_max_length": max_length} if max_length else {}),
        **SPECIAL_TOKENS,
    )
