"""Causal labels, metrics that don't depend on batching, and which objective fits which model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    ElectraConfig,
    GPT2Config,
    T5Config,
    XLNetConfig,
)

import hf_lnlm  # noqa: F401 (registers the families)
from hf_lnlm.data.blocks import PackedBlocks
from hf_lnlm.data.bptt_streams import BPTTStreams
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.randomness import generator
from tests.data.subwords import texts

TOKENIZER = build_tokenizer("byte", sentinels=10)
BOS, EOS = 1, 2


def batch_of(rows: list[list[int]], **columns) -> dict[str, torch.Tensor]:
    extra = [{name: values[index] for name, values in columns.items()} for index in range(len(rows))]
    items = [{"input_ids": row, "example_id": index, **more} for index, (row, more) in enumerate(zip(rows, extra))]
    return objective("causal").collator(TOKENIZER, bookkeeping=True)(items)


def test_labels_are_hidden_by_the_mask_and_not_by_the_pad_id() -> None:
    tokenizer = build_tokenizer("byte")
    tokenizer.pad_token = tokenizer.eos_token
    batch = objective("causal").collator(tokenizer)([{"input_ids": [10, 11, EOS]}, {"input_ids": [10, EOS]}])
    assert batch["labels"].tolist() == [[10, 11, EOS], [10, EOS, -100]]
    assert batch["input_ids"].tolist() == [[10, 11, EOS], [10, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_full_rows_have_no_attention_mask() -> None:
    assert batch_of([[10, 11], [12, 13]]).keys() == {"input_ids", "labels"}
    masked = objective("causal").collator(TOKENIZER)([{"input_ids": [10, 11, 0], "attention_mask": [1, 1, 0]}])
    assert masked["labels"].tolist() == [[10, 11, -100]]


def test_documents_first_tokens_are_not_predicted_across_boundaries() -> None:
    batch = batch_of([[BOS, 10, EOS, BOS, 11]], position_ids=[[0, 1, 2, 0, 1]], num_bytes=[2])
    assert batch["labels"].tolist() == [[-100, 10, EOS, -100, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["num_bytes"].tolist() == [2]


def test_lanes_bring_their_next_token() -> None:
    batch = batch_of([[10, 11, 12], [20, 21, 22]], next_id=[13, -100], reset=[True, False])
    assert batch["shift_labels"].tolist() == [[11, 12, 13], [21, 22, -100]]
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert batch["reset"].tolist() == [True, False]
    lanes = BPTTStreams(Dataset.from_dict({"text": texts(3)}), TOKENIZER, 8, 2, boundaries=True)
    whole = lanes.tokens.ids.slice(0, len(lanes.tokens))
    labels = [
        objective("causal").collator(TOKENIZER)([lanes[k]])["shift_labels"][0].tolist() for k in range(0, len(lanes), 2)
    ]
    wanted = np.where(lanes.tokens.positions(0, len(whole)) == 0, -100, whole)[1 : 1 + 8 * lanes.num_windows]
    assert np.concatenate(labels).tolist() == wanted.tolist()


def test_rows_that_predict_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 of 2 labels \(0 %\) count in a batch of 2 rows: rows of one token"):
        batch_of([[10], [11]])
    tokenizer = build_tokenizer("byte")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="rows of different lengths need a pad token"):
        objective("causal").collator(tokenizer)([{"input_ids": [10, 11]}, {"input_ids": [10]}])


def test_metrics_by_hand() -> None:
    causal = objective("causal")
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]]))
    sums = causal.sums(logits, {"labels": torch.tensor([[2, 1, 1]]), "num_bytes": torch.tensor([4])})
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {"nll": -math.log(0.25) - math.log(0.8), "tokens": 2, "correct": 1, "bytes": 4}
    )
    metrics = causal.summary(sums)
    assert metrics["loss"] == pytest.approx((math.log(4) + math.log(1.25)) / 2)
    assert metrics["perplexity"] == pytest.approx(math.sqrt(5))
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(5) / 4)
    assert metrics["accuracy"] == 0.5
    shifted = causal.sums(logits, {"shift_labels": torch.tensor([[0, -100, 2]]), "labels": torch.tensor([[0, 0, 0]])})
    assert float(shifted["nll"]) == pytest.approx(math.log(2) + math.log(3)) and "bytes" not in shifted


@pytest.mark.parametrize("name", ["causal", "masked", "span", "permutation"])
def test_metrics_do_not_depend_on_batching(name: str) -> None:
    learnt = objective(name)
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 20, 30), torch.randint(0, 30, (12, 20))
    labels[torch.rand(12, 20) < torch.linspace(0, 0.95, 12)[:, None]] = -100
    num_bytes = torch.arange(12)

    def evaluate(size: int) -> dict[str, float]:
        parts = [slice(start, start + size) for start in range(0, 12, size)]
        sums = [learnt.sums(logits[p], {"labels": labels[p], "num_bytes": num_bytes[p]}) for p in parts]
        return learnt.summary({key: sum(part[key] for part in sums) for key in sums[0]})

    whole = evaluate(12)
    for size in (1, 5, 7):
        assert evaluate(size) == pytest.approx(whole, rel=1e-6)
    assert ("bits_per_byte" in whole) == (name == "causal")


def test_bits_per_byte_do_not_depend_on_the_block_length() -> None:
    documents = Dataset.from_dict({"text": texts(3)})
    table = torch.randn(273, 273, generator=torch.Generator().manual_seed(0))
    causal, collate = objective("causal"), objective("causal").collator(TOKENIZER, bookkeeping=True)
    found = []
    for length in (16, 50, 4000):
        blocks = PackedBlocks(documents, TOKENIZER, drop_last=False, **causal.packing(TOKENIZER, length))
        batches = [collate([blocks[index]]) for index in range(len(blocks))]
        sums = [causal.sums(table[batch["input_ids"]], batch) for batch in batches]
        total = {key: sum(float(part[key]) for part in sums) for key in sums[0]}
        assert total["bytes"] == sum(len(text.encode()) for text in texts(3))
        found.append(causal.summary(total)["bits_per_byte"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_nothing_predicted_is_not_a_metric() -> None:
    empty = objective("causal").sums(torch.zeros(1, 2, 3), {"labels": torch.full((1, 2), -100)})
    with pytest.raises(ValueError, match="no token was predicted"):
        objective("causal").summary(empty)


def rnn(**fields):
    return AutoConfig.for_model("lnlm_rnn", vocab_size=273, **fields)


def dnc(**fields):
    return AutoConfig.for_model("lnlm_dnc", vocab_size=273, **fields)


FITS = [
    ("causal", GPT2Config()), ("causal", rnn()), ("causal", BertConfig(is_decoder=True)),
    ("masked", BertConfig()), ("masked", AlbertConfig()), ("masked", ElectraConfig()), ("span", T5Config()),
    ("masked", rnn(bidirectional=True)), ("permutation", XLNetConfig()), ("bidirectional", rnn()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), FITS, ids=lambda value: getattr(value, "model_type", value))
def test_objectives_that_fit(name: str, config) -> None:
    objective(name).check(config, TOKENIZER)


MISFITS = [
    ("masked", rnn(), "lnlm_rnn reads left to right only. Objectives that fit lnlm_rnn: causal, bidirectional. "),
    ("masked", GPT2Config(), "gpt2 reads left to right only. Objectives that fit gpt2: causal"),
    ("masked", T5Config(), "Objectives that fit t5: span"),
    ("span", GPT2Config(), "objective 'span' needs a model that reads with an encoder and writes with a decoder"),
    ("span", rnn(), "Models that fit 'span': lnlm_seq2seq, t5"),
    ("causal", BertConfig(), "bert reads in both directions. Objectives that fit bert: masked, replaced_token, s"),
    ("masked", XLNetConfig(), "needs AutoModelForMaskedLM, and xlnet has no such head. "),
    ("causal", dnc(bidirectional=True), "lnlm_dnc reads in both directions. Objectives that fit lnlm_dnc: masked, re"),
    ("causal", XLNetConfig(), "xlnet reads in both directions"),
    ("causal", T5Config(), "t5 reads with an encoder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "message"), MISFITS, ids=lambda value: getattr(value, "model_type", None))
def test_objectives_that_do_not_fit(name: str, config, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        objective(name).check(config, TOKENIZER)
    assert message in str(caught.value)


def test_a_model_needs_the_tokens_of_its_objective() -> None:
    plain = build_tokenizer("byte")
    plain.mask_token = None
    with pytest.raises(ValueError, match="needs a mask token"):
        objective("masked").check(BertConfig(), plain)
    with pytest.raises(ValueError, match="needs sentinels"):
        objective("span").check(T5Config(), plain)


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match=r"objective must be one of causal, masked, .*, got 'casual'; did you mean 'causal'"
    ):
        objective("casual")


def test_generators_are_independent_and_repeatable() -> None:
    keys = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b"), (2**63, 5, 2**62, "a")]
    draws = [generator(*key).random(1000) for key in keys]
    assert np.array_equal(draws[0], generator(*keys[0]).random(1000))
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.15


def gpt2() -> GPT2Config:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": BOS, "eos_token_id": EOS}
    return GPT2Config(vocab_size=273, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **sizes)


@pytest.mark.parametrize("config", [gpt2(), rnn(hidden_size=16, num_hidden_layers=1)], ids=lambda c: c.model_type)
def test_models_keep_packed_documents_apart(config) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    causal = objective("causal", boundaries=True)
    documents = Dataset.from_dict({"text": [text[: 20 + 7 * index] for index, text in enumerate(texts(6))]})
    batch = causal.collator(TOKENIZER)([PackedBlocks(documents, TOKENIZER, **causal.packing(TOKENIZER, 64))[1]])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        for start, end in zip(starts, [*starts[1:], 64]):
            alone = model(batch["input_ids"][:, start:end], use_cache=False).logits[0]
            assert torch.allclose(packed[start:end], alone, atol=1e-5)
