"""Tokenizers made of `tokenizers` parts only, so that a checkpoint needs no custom class to load them.

Every kind but `elmo` starts with the same seven special tokens under the same ids (`SPECIAL_TOKENS`); T5's sentinels,
where asked for, are the last ids of the vocabulary and descend: `<extra_id_0>` is the highest. `check_vocabulary` compares
a tokenizer with a model's configuration before a run starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..models.base import LNLMConfig
from ..models.parts import longest_input

SPECIAL_TOKENS: dict[str, str] = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
}
"""Attribute of the tokenizer → text of the special token; the position is the id (`<pad>` is 0, `<sep>` is 6)."""

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYXBZUOJ*-"
"""The 20 amino acids, then X (any), B, Z, J (ambiguous), U, O (rare), `*` (stop) and `-` (gap): IUPAC's letters."""

TEMPLATES: dict[str, tuple[str, str]] = {
    "bert": ("<cls> $A <sep>", "<cls> $A <sep> $B:1 <sep>:1"),
    "roberta": ("<cls> $A <sep>", "<cls> $A <sep> <sep> $B <sep>"),
    "t5": ("$A <eos>", "$A <eos> $B <eos>"),
    "causal": ("<bos> $A", "<bos> $A $B"),
}
"""Name → (template of one text, template of a pair), in `tokenizers` notation."""

ELMO_TOKENS: dict[str, str] = {"pad_token": "<pad>", "bos_token": "<S>", "eos_token": "</S>"}
"""Special tokens of the kind `elmo`, with ELMo's ids 0, 257 and 258."""

KINDS = ("byte", "char", "word", "protein", "bpe", "elmo")
DEFAULT_BPE_VOCABULARY = 8192
PADDED_VOCABULARY = 128
"""A model's vocabulary may exceed its tokenizer's by less than this many unused rows, as stock T5's does."""


def build_tokenizer(
    kind: str,
    texts: Iterable[str] | None = None,
    *,
    vocab_size: int | None = None,
    sentinels: int = 0,
    template: str | None = None,
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer that stock transformers saves and loads by itself.

    Args:
        kind: `byte` (UTF-8 bytes, gives back any string exactly), `char` (Unicode characters of `texts`), `word`
            (whitespace-separated words of `texts`, as PTB and WikiText are written), `protein` (amino acids),
            `bpe` (byte-level byte-pair encoding trained on `texts`, gives back any string exactly) or `elmo` (ELMo's
            262 character ids: one that begins each whitespace-separated word, and the word's UTF-8 bytes).
        texts: The training texts of `char`, `word` and `bpe`; read once. The other kinds need none.
        vocab_size: Upper bound of the whole vocabulary, special tokens and sentinels included; `byte` and `protein`
            have a fixed size. Default: all characters or words seen, 8,192 for `bpe`.
        sentinels: Number of T5 sentinels `<extra_id_i>`, the last ids of the vocabulary in descending order.
        template: `bert`, `roberta`, `t5` or `causal` (`elmo` has this only): which special tokens a call adds around its
            text. None adds none, which is what packing and preference training want. With `bert` or `roberta`, special
            tokens written in a text (`"a <mask> b"`) are read as such, since the fill-mask pipeline needs it; a `byte`
            tokenizer without them takes every text literally (set its `split_special_tokens = False` where a library
            writes the end token as text, as TRL does).
        max_length: Longest input of the model that reads its ids, its `max_position_embeddings`, for `truncation=True`;
            None for a model without a limit.

    Returns:
        A `PreTrainedTokenizerFast` with ids as in `SPECIAL_TOKENS`.

    Raises:
        ValueError: An unknown kind or template, missing texts, or a vocabulary size that can't be had.

    >>> tokenizer = build_tokenizer("byte", template="causal")
    >>> tokenizer("hi").input_ids
    [1, 111, 112]
    >>> tokenizer.decode([111, 112])
    'hi'
    """
    _check_choices(kind, sentinels, template)
    room = None if vocab_size is None else vocab_size - sentinels
    if kind == "elmo":
        return _elmo_tokenizer(vocab_size, sentinels, template, max_length)
    if kind in ("byte", "protein"):
        backend = _byte_backend() if kind == "byte" else _protein_backend()
        if room is not None and room != backend.get_vocab_size():
            size = backend.get_vocab_size() + sentinels
            raise ValueError(f"vocab_size of a {kind} tokenizer with {sentinels} sentinels is {size}, got {vocab_size}")
    else:
        backend = _learnt_backend(kind, texts, room)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 or None, got {max_length}")
    literal = kind == "byte" and template not in ("bert", "roberta")
    tokenizer = _wrap(backend, sentinels, template, literal)
    tokenizer.model_max_length = max_length or VERY_LARGE_INTEGER
    return tokenizer


def word_tokenizer(
    words: Sequence[str], *, unknown: str | None = None, end: str | None = None, lower: bool = False
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of another project's words, split at white space.

    Args:
        words: Each once, in the order of the ids.
        unknown: The word that stands for all others; without one they are an error.
        end: The word that ends a text or line.
        lower: Whether texts are lower-cased first.
    """
    backend = _word_backend(words, unknown)
    if lower:
        backend.normalizer = normalizers.Lowercase()
    special = {"unk_token": unknown, "eos_token": end}
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (unknown, end) if word])
    given: dict[str, Any] = {name: word for name, word in special.items() if word}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **given)


def _check_choices(kind: str, sentinels: int, template: str | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if sentinels < 0:
        raise ValueError(f"sentinels must be 0 or more, got {sentinels}")
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)} or None, got {template!r}")


def _learnt_backend(kind: str, texts: Iterable[str] | None, room: int | None) -> Tokenizer:
    """The backends whose vocabulary comes from text; `room` is the vocabulary without sentinels."""
    if texts is None:
        raise ValueError(f"a {kind} tokenizer is built from texts, got none")
    texts = [texts] if isinstance(texts, str) else texts
    if kind == "bpe":
        return _bpe_backend(texts, DEFAULT_BPE_VOCABULARY if room is None else room)
    units: Counter[str] = Counter()
    for text in texts:
        units.update(text if kind == "char" else text.split())
    if not units:
        raise ValueError(f"a {kind} tokenizer is built from texts, got no {kind} in them")
    specials = list(SPECIAL_TOKENS.values())
    if room is not None and room <= len(specials):
        raise ValueError(f"vocab_size must exceed the {len(specials)} special tokens and the sentinels, got {room}")
    ranked = sorted((unit for unit in units if unit not in specials), key=lambda unit: (-units[unit], unit))
    vocabulary = specials + ranked[: None if room is None else room - len(specials)]
    return _char_backend(vocabulary) if kind == "char" else _word_backend(vocabulary)


def byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte value 0 … 255 (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = {byte: chr(256 + rank) for rank, byte in enumerate(b for b in range(256) if b not in printable)}
    return [others.get(byte, chr(byte)) for byte in range(256)]


def _byte_backend() -> Tokenizer:
    tokens = [*SPECIAL_TOKENS.values(), *byte_symbols()]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _elmo_tokenizer(
    vocab_size: int | None, sentinels: int, template: str | None, max_length: int | None
) -> PreTrainedTokenizerFast:
    """ELMo's characters: 0 is padding, a byte's value + 1, 257 and 258 a text's ends, 259 a word's begin."""
    for name, given, wanted in (("vocab_size", vocab_size, (None, 262)), ("sentinels", sentinels, (0,))):
        if given not in wanted:
            raise ValueError(f"{name} of an elmo tokenizer must be {wanted[-1]}, got {given}")
    if template not in (None, "causal"):
        raise ValueError(f"template of an elmo tokenizer must be causal or None, got {template!r}")
    pad, begin, end = ELMO_TOKENS.values()
    symbols = byte_symbols()
    marker, symbols[0x20] = symbols[0x20], "<0x20>"  # a word has no space in it: its symbol is free to begin words
    tokens = [pad, *symbols, begin, end, marker, "</W>", "<filler>"]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (pad, begin, end)])
    if template is not None:
        ids = [(begin, tokens.index(begin)), (end, tokens.index(end))]
        single, pair = f"{begin} $A {end}", f"{begin} $A {end} {begin} $B {end}"
        backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length or VERY_LARGE_INTEGER,
        **ELMO_TOKENS,
    )


def _char_backend(vocabulary: Sequence[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return backend


def _protein_backend() -> Tokenizer:
    backend = _char_backend([*SPECIAL_TOKENS.values(), *AMINO_ACIDS])
    lower = [normalizers.Replace(letter.lower(), letter) for letter in AMINO_ACIDS if letter.isalpha()]
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), ""), *lower])
    return backend


def _word_backend(vocabulary: Sequence[str], unknown: str | None = "<unk>") -> Tokenizer:
    known = {} if unknown is None else {"unk_token": unknown}
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, **known))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _bpe_backend(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    specials = list(SPECIAL_TOKENS.values())
    smallest = len(specials) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size of a bpe tokenizer must be {smallest} or more without sentinels, got {vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _wrap(backend: Tokenizer, sentinels: int, template: str | None, literal: bool) -> PreTrainedTokenizerFast:
    """Add sentinels and template to a backend and hand it to transformers."""
    names = [f"<extra_id_{index}>" for index in reversed(range(sentinels))]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS.values()])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if template is not None:
        single, pair = TEMPLATES[template]
        ids = [(token, index) for index, token in enumerate(SPECIAL_TOKENS.values())]
        backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    extra: dict[str, Any] = {"extra_special_tokens": names} if names else {}
    if template == "bert":
        extra["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=literal,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
        **extra,
    )


def sentinel_ids(tokenizer: Any) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>` … as far as the tokenizer has them without a gap; empty if it has none."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (index := vocabulary.get(f"<extra_id_{len(ids)}>")) is not None:
        ids.append(index)
    return ids


def fit_length(tokenizer: Any, config: Any) -> Any:
    """Let a tokenizer know the longest input of its model, so that `truncation=True` cuts where the model ends.

    Args:
        tokenizer: any transformers tokenizer; changed in place. One of a stock model without a limit stays as it is.
        config: the model's configuration.

    Returns:
        The tokenizer.
    """
    limit = longest_input(config)
    if limit is not None or isinstance(config.get_text_config(), LNLMConfig):
        tokenizer.model_max_length = limit or VERY_LARGE_INTEGER
    return tokenizer


def without_length_remark(tokenizer: Any) -> Any:
    """Return a tokenizer that says nothing of long texts: for callers that cut them, or refuse them in their own words."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer and a model's configuration that disagree, before anything is trained.

    A model's vocabulary may hold fewer than 128 unused rows at its end (stock T5's 32,128 for 32,100 tokens).

    Args:
        tokenizer: Any transformers tokenizer.
        config: The model's configuration; ids that it leaves at None aren't compared.

    Raises:
        ValueError: Names both vocabulary sizes, or the special token with both ids, or the id beyond the vocabulary; or
            the model reads words in characters, and the tokenizer doesn't mark where one begins.
    """
    begin = getattr(config, "word_start_token_id", None)
    if begin is not None and tokenizer.get_vocab().get(byte_symbols()[0x20]) != begin:
        raise ValueError(
            f"{config.model_type} reads the bytes of words, each after the id {begin} (word_start_token_id): it needs a "
            "tokenizer of the kind elmo, got another"
        )
    size, rows = len(tokenizer), getattr(config, "vocab_size", None)
    if rows is None:
        return
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows or rows - size >= PADDED_VOCABULARY:
        raise ValueError(
            f"the tokenizer has {size} tokens (highest id {highest}) but the model's vocab_size is {rows}: "
            f"build the model with vocab_size={max(size, highest + 1)} or use the tokenizer that belongs to it"
        )
    for name in ("pad", "bos", "eos", "mask", "decoder_start"):
        _check_special(name, getattr(config, f"{name}_token_id", None), tokenizer, rows)


def _check_special(name: str, wanted: int | list[int] | None, tokenizer: Any, rows: int) -> None:
    """Compare one special id of the configuration (`eos` may be a list) with the tokenizer's."""
    allowed = [] if wanted is None else wanted if isinstance(wanted, (list, tuple)) else [wanted]
    beyond = [index for index in allowed if not 0 <= index < rows]
    if beyond:
        raise ValueError(f"{name}_token_id of the model's config must lie in 0 … {rows - 1}, got {beyond[0]}")
    actual = getattr(tokenizer, f"{name}_token_id", None)
    if allowed and actual is not None and actual not in allowed:
        token = tokenizer.convert_ids_to_tokens(actual)
        raise ValueError(
            f"{name}_token_id is {wanted} in the model's config but {actual} ({token!r}) in the tokenizer: "
            f"set {name}_token_id={actual} or use the tokenizer that belongs to the model"
        )


def check_token_ids(ids: Any, vocab_size: int) -> None:
    """Refuse token ids that a model's embedding doesn't have.

    Args:
        ids: Integer array or tensor of any shape (numpy or torch).
        vocab_size: Rows of the embedding.

    Raises:
        ValueError: Names the highest offending id, or the lowest if one is negative.
    """
    if ids.shape and 0 in ids.shape:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids must lie in 0 … {vocab_size - 1} (vocab_size), got {low if low < 0 else high}")
