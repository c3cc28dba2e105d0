"""Tiny stock models of every kind of head, each with a dataset whose rows have unequal numbers of labels."""

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers as T

from hf_lnlm.data.labelled import Rows
from hf_lnlm.data.section import DataSection
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.tasks.question_answering import QuestionAnswering

VOCAB, LENGTH, ROWS = 40, 12, 8
Row = dict[str, Any]


def _tokens(generator: random.Random) -> list[int]:
    return [generator.randrange(5, VOCAB) for _ in range(LENGTH)]


def _mask(row: int) -> list[int]:
    return [1] * (LENGTH - row % 4) + [0] * (row % 4)


def causal(row: int, generator: random.Random) -> Row:
    ids = _tokens(generator)
    keep = 3 + row
    return {"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": ids[:keep] + [-100] * (LENGTH - keep)}


def masked(row: int, generator: random.Random) -> Row:
    ids = _tokens(generator)
    labels = [-100] * LENGTH
    for position in range(1, 2 + row):
        labels[position] = ids[position]
    return {"input_ids": ids, "attention_mask": _mask(row), "labels": labels}


def sequence(row: int, generator: random.Random) -> Row:
    return {"input_ids": _tokens(generator), "attention_mask": [1] * LENGTH, "labels": generator.randrange(3)}


def ended(row: int, generator: random.Random) -> Row:
    """A row for the head that pools at </s>, which every row must have."""
    made = sequence(row, generator)
    return {**made, "input_ids": [*made["input_ids"][:-1], 1]}


def regression(row: int, generator: random.Random) -> Row:
    return {**sequence(row, generator), "labels": generator.random()}


def several(row: int, generator: random.Random) -> Row:
    return {**sequence(row, generator), "labels": [float(generator.randrange(2)) for _ in range(3)]}


def token(row: int, generator: random.Random) -> Row:
    labels = [generator.randrange(3) if position < 2 + row else -100 for position in range(LENGTH)]
    return {"input_ids": _tokens(generator), "attention_mask": _mask(row), "labels": labels}


def question(row: int, generator: random.Random) -> Row:
    start, end = generator.randrange(LENGTH), LENGTH + 3 if row % 3 == 0 else generator.randrange(LENGTH)
    plain = {"input_ids": _tokens(generator), "attention_mask": [1] * LENGTH}
    return {**plain, "start_positions": start, "end_positions": end}


def question_inside(row: int, generator: random.Random) -> Row:
    return {**question(row, generator), "end_positions": generator.randrange(LENGTH)}


def replaced(row: int, generator: random.Random) -> Row:
    labels = [generator.randrange(2) for _ in range(LENGTH)]
    return {"input_ids": _tokens(generator), "attention_mask": _mask(row), "labels": labels}


def pair(label: str) -> Callable[[int, random.Random], Row]:
    return lambda row, generator: {**masked(row, generator), label: generator.randrange(2)}


def choice(row: int, generator: random.Random) -> Row:
    rows = [_tokens(generator) for _ in range(3)]
    return {"input_ids": rows, "attention_mask": [[1] * LENGTH] * 3, "labels": generator.randrange(3)}


def span(row: int, generator: random.Random) -> Row:
    labels = [*_tokens(generator)[: 2 + row]]
    return {
        "input_ids": _tokens(generator),
        "attention_mask": [1] * LENGTH,
        "labels": labels + [-100] * (10 - len(labels)),
    }


_BERT: dict[str, Any] = dict(  # noqa: C408
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GPT2: dict[str, Any] = dict(  # noqa: C408
    vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=3, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, classifier_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_XLNET: dict[str, Any] = dict(  # noqa: C408
    vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=32, num_labels=3, dropout=0.0, summary_last_dropout=0.0
)
_T5: dict[str, Any] = dict(  # noqa: C408
    vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=3, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, classifier_dropout=0.0,
)  # fmt: skip
_LLAMA: dict[str, Any] = dict(  # noqa: C408
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=32, max_position_embeddings=32, num_labels=3, classifier_dropout=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "Bert": (T.BertConfig, _BERT),
    "Roberta": (T.RobertaConfig, _BERT),
    "Albert": (T.AlbertConfig, {**_BERT, "embedding_size": 8, "classifier_dropout_prob": 0.0}),
    "Electra": (T.ElectraConfig, {**_BERT, "embedding_size": 8, "summary_last_dropout": 0.0}),
    "XLNet": (T.XLNetConfig, _XLNET),
    "T5": (T.T5Config, _T5),
    "GPT2": (T.GPT2Config, _GPT2),
    "Llama": (T.LlamaConfig, _LLAMA),
}
HEADS: dict[str, Callable[[int, random.Random], Row]] = {
    "GPT2LMHeadModel": causal, "LlamaForCausalLM": causal, "BertLMHeadModel": causal, "XLNetLMHeadModel": masked,
    "BertForMaskedLM": masked, "RobertaForMaskedLM": masked, "AlbertForMaskedLM": masked, "ElectraForMaskedLM": masked,
    "BertForPreTraining": pair("next_sentence_label"), "AlbertForPreTraining": pair("sentence_order_label"),
    "ElectraForPreTraining": replaced, "T5ForConditionalGeneration": span,
    **{f"{name}ForSequenceClassification": sequence for name in _CONFIGS},
    **{f"{name}ForTokenClassification": token for name in _CONFIGS},
    **{f"{name}ForQuestionAnswering": question for name in _CONFIGS},
    "BertForSequenceClassification, regression": regression, "GPT2ForSequenceClassification, several": several,
    "XLNetForQuestionAnswering": question_inside, "XLNetForQuestionAnsweringSimple": question,
    "BertForMultipleChoice": choice,
}  # fmt: skip


def tokenizer() -> Any:
    """Return a tokenizer of words whose ids a tiny model has."""
    words = " ".join(chr(97 + n) * 2 for n in range(20))
    return build_tokenizer("word", [words] * 3, template="bert")


def questions() -> tuple[Any, Rows]:
    """Return the task of reading five questions, and their rows, of one to four windows each."""
    generator, rows = random.Random(2), []
    for number in range(5):
        words = [chr(97 + generator.randrange(20)) * 2 for _ in range(5 + 5 * number)]
        rows.append({"question": "aa", "context": " ".join(words), "answers": words[-1]})
    task = QuestionAnswering(stride=2)
    known = tokenizer()
    read = [task.read(row, DataSection()) for row in rows]
    held, _ = task.encode_held(read, DataSection(), known, T.BertConfig(type_vocab_size=2), LENGTH)
    assert len(known) <= VOCAB and len({len(row["windows"]) for row in held}) > 2
    return task.measuring(held), Rows(held)


def build(head: str) -> tuple[torch.nn.Module, list[Row]]:
    """Return a seeded tiny model of a class of transformers and eight rows for it."""
    name = next(prefix for prefix in _CONFIGS if head.startswith(prefix))
    config_class, values = _CONFIGS[name]
    values = dict(values)
    if "QuestionAnswering" in head or "PreTraining" in head:
        values["num_labels"] = 2
    head, _, kind = head.partition(", ")
    rows = HEADS[f"{head}, {kind}" if kind else head]
    if kind == "regression":
        values["num_labels"] = 1
    if head == "BertLMHeadModel":
        values["is_decoder"] = True
    if head == "T5ForSequenceClassification":
        rows = ended
    torch.manual_seed(0)
    model = getattr(T, head)(config_class(**values))
    generator = random.Random(1)
    return model, [rows(row, generator) for row in range(ROWS)]
