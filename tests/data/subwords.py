"""Small subword tokenizers of the three kinds that stock models use, trained on Python's own sources."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_lnlm.data.sources import stdlib_texts

NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
VOCABULARY = 600


@cache
def texts(count: int = 12) -> list[str]:
    """The first documents of the standard library, at most 20,000 characters each."""
    return [text[:20_000] for text, _ in zip(stdlib_texts(), range(count), strict=False)]


def _wordpiece() -> tuple[Tokenizer, object]:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer


def _byte_bpe() -> tuple[Tokenizer, object]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend, trainers.BpeTrainer


def _unigram() -> tuple[Tokenizer, object]:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend, trainers.UnigramTrainer


BACKENDS = {"wordpiece": _wordpiece, "byte-bpe": _byte_bpe, "unigram": _unigram}


@cache
def subword_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer of the kind `wordpiece`, `byte-bpe` or `unigram`."""
    backend, trainer = BACKENDS[kind]()
    options = {"vocab_size": VOCABULARY, "special_tokens": list(NAMES.values()), "show_progress": False}
    if kind == "unigram":
        options["unk_token"] = "[UNK]"
    backend.train_from_iterator(texts(), trainer(**options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **NAMES)
