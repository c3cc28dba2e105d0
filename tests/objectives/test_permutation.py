"""Permutation language modelling: by hand, every difference from transformers' collator, leakage, and memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, DataCollatorForPermutationLanguageModeling, XLNetConfig, XLNetLMHeadModel

from hf_lnlm.data.bptt_streams import BPTTStreams
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.permutation import choose_targets, hidden_from
from tests.data.subwords import texts
from tests.trainer import runs

TOKENIZER = build_tokenizer("byte")
SEP, CLS, LENGTH = 6, 5, 26
PLAIN = objective("permutation", whole_word=False)


def xlnet(**fields) -> XLNetLMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 263, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "dropout": 0.0}
    return XLNetLMHeadModel(XLNetConfig(**sizes, initializer_range=0.3, **fields)).eval()


def rows_of(number: int = 3, length: int = LENGTH) -> list[dict]:
    random = np.random.default_rng(0)
    ids = random.integers(10, 260, (number, length - 2))
    return [{"input_ids": np.r_[row, SEP, CLS], "example_id": index, "epoch": 0} for index, row in enumerate(ids)]


def theirs(rows: list[dict], tokenizer=TOKENIZER) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    collate = DataCollatorForPermutationLanguageModeling(tokenizer)
    return collate([{"input_ids": [int(i) for i in row["input_ids"]]} for row in rows])


def test_who_sees_whom_by_hand() -> None:
    # tokens 0 … 5: context, target, target, context, sep, target; order of factorisation 9 2 0 9 1 3
    targets = np.array([0, 1, 1, 0, 0, 1], bool)
    functional = np.array([0, 0, 0, 0, 1, 0], bool)
    hidden = hidden_from(targets, functional, np.array([9, 2, 0, 9, 1, 3]), np.zeros(6, int))
    seen = [np.flatnonzero(~row).tolist() for row in hidden]
    assert seen == [
        [0, 3],  # context sees context
        [0, 2, 3, 4],  # third in the order: what is before it, not itself
        [0, 3],  # first
        [0, 3],
        [0, 2, 3, 4],  # a special token keeps its place (second) and sees itself
        [0, 1, 2, 3, 4],  # last
    ]


def test_blocks_do_not_cross() -> None:
    targets = np.array([1, 0, 1, 0], bool)
    hidden = hidden_from(targets, np.zeros(4, bool), np.arange(4), np.array([0, 0, 1, 1]))
    assert [np.flatnonzero(~row).tolist() for row in hidden] == [[1], [1], [0, 1, 3], [0, 1, 3]]


def test_spans_have_context_and_the_goal_is_met_exactly() -> None:
    free = np.ones(600, bool)
    lengths, everywhere = [], np.zeros(600)
    for seed in range(60):
        starts = np.arange(600) % 3 == 0
        chosen = choose_targets(free, starts, 85, objective("permutation"), np.random.default_rng(seed))
        assert chosen.sum() == 85
        everywhere += chosen
        begins = np.flatnonzero(chosen & ~np.r_[False, chosen[:-1]])
        ends = np.flatnonzero(chosen & ~np.r_[chosen[1:], False]) + 1
        lengths += [end - begin for begin, end in zip(begins, ends) if starts[begin]]
    assert everywhere.reshape(4, -1).mean(1) / 60 == pytest.approx([85 / 600] * 4, rel=0.25), "all of a row"
    words = np.array(lengths) / 3
    shares = [np.mean(words == n) for n in range(1, 6)]
    assert shares[0] > shares[1] > shares[2] > shares[4], "p(n) falls with n"
    few = choose_targets(np.array([1, 0, 0, 1], bool), np.ones(4, bool), 3, PLAIN, np.random.default_rng(0))
    assert few.tolist() == [True, False, False, True], "no more than there are"


def test_a_batch() -> None:
    rows = rows_of()
    batch = PLAIN.collator(TOKENIZER, seed=1)(rows)
    assert batch["labels"].shape == (3, 4) and batch["target_mapping"].shape == (3, 4, LENGTH)
    for row in range(3):
        places = batch["target_mapping"][row].argmax(-1)
        assert (batch["target_mapping"][row].sum(-1) == 1).all()
        assert torch.equal(batch["input_ids"][row, places], batch["labels"][row])
        assert not {SEP, CLS} & set(batch["labels"][row].tolist())
        assert bool(batch["perm_mask"][row, places, places].all()), "no target sees itself"
    again = PLAIN.collator(TOKENIZER, seed=1)(rows[1:2])
    assert torch.equal(again["perm_mask"][0], batch["perm_mask"][1])
    assert not torch.equal(
        PLAIN.collator(TOKENIZER, seed=1)([{**rows[1], "epoch": 1}])["perm_mask"][0], batch["perm_mask"][1]
    )


def _span_lengths(chosen: np.ndarray) -> list[float]:
    """Shares of runs of 1 to 5 chosen tokens, over all rows `[rows, tokens]`."""
    runs: list[int] = []
    for row in chosen:
        edges = np.flatnonzero(np.diff(np.r_[False, row, False]))
        runs += (edges[1::2] - edges[::2]).tolist()
    return [np.mean([length == n for length in runs]) for n in range(1, 6)]


def test_differences_from_transformers_collator() -> None:
    rows = rows_of(8)
    ours, stock = PLAIN.collator(TOKENIZER)(rows), theirs(rows)
    # inputs keep the true words; theirs hide them from later targets too
    assert torch.equal(ours["input_ids"], torch.tensor(np.stack([row["input_ids"] for row in rows])))
    hidden = stock["labels"] != -100
    assert (stock["input_ids"][hidden] == TOKENIZER.mask_token_id).all()
    # only predicted positions go through query stream and softmax
    assert ours["target_mapping"].shape == (8, 4, LENGTH)
    assert torch.equal(stock["target_mapping"][0], torch.eye(LENGTH))
    # exactly a sixth of the tokens, whatever the row
    assert (ours["labels"] != -100).sum(1).tolist() == [4] * 8
    assert len(set(hidden.sum(1).tolist())) > 1
    # special tokens keep a place in the order; theirs are seen by all
    assert ours["perm_mask"][:, :, LENGTH - 2 :].any() and not stock["perm_mask"][:, :, LENGTH - 2 :].any()
    # padding isn't attended
    uneven = [rows[0], {**rows[1], "input_ids": rows[1]["input_ids"][:12]}]
    assert PLAIN.collator(TOKENIZER)(uneven)["attention_mask"].sum(1).tolist() == [LENGTH, 12]
    assert "attention_mask" not in stock
    # rows of odd length and tokenizers without a pad or mask token
    odd = [{**row, "input_ids": row["input_ids"][1:]} for row in rows]
    bare = copy.deepcopy(TOKENIZER)
    bare.pad_token = bare.mask_token = None
    assert PLAIN.collator(bare)(odd)["input_ids"].shape == (8, LENGTH - 1)
    with pytest.raises(ValueError, match="sequence lengths be even"):
        theirs(odd)
    with pytest.raises(Exception, match=r"mask token|pad|padding_mask"):
        theirs(rows, bare)
    # spans are 1 to 5 words, short ones more often; theirs are 1 to 5 tokens, all lengths equally likely
    long = rows_of(60, 602)
    shares = [_span_lengths((theirs(long)["labels"] != -100).numpy())]
    shares += [_span_lengths(PLAIN.collator(TOKENIZER)(long)["target_mapping"].sum(1).bool().numpy())]
    assert shares[0] == pytest.approx([0.2] * 5, abs=0.06)
    assert shares[1][0] > 0.35 and sorted(shares[1], reverse=True) == shares[1], shares[1]
    # the order covers the row; theirs lets the first half see what isn't predicted in the second
    blocks = objective("permutation", whole_word=False, perm_size=LENGTH // 2).collator(TOKENIZER)(rows)
    assert blocks["perm_mask"][:, : LENGTH // 2, LENGTH // 2 :].all()
    assert not stock["perm_mask"][:, : LENGTH // 2, LENGTH // 2 :].all()


def test_spans_are_of_whole_words() -> None:
    words = np.repeat(np.arange(60), 3)
    rows = [{"input_ids": 10 + words, "word_ids": words, "example_id": index} for index in range(20)]
    batch = objective("permutation").collator(TOKENIZER)(rows)
    whole = 0
    for row in range(20):
        chosen = batch["target_mapping"][row].sum(0).bool().numpy().reshape(60, 3)
        whole += (chosen.all(1).sum() * 3) / chosen.sum()
    assert whole / 20 > 0.8, "but for the last tokens up to the exact number"
    with pytest.raises(ValueError, match="whole_word=True needs rows with word_ids"):
        objective("permutation").collator(TOKENIZER)(rows_of(1))


def test_what_is_hidden_from_a_target_does_not_change_its_logits() -> None:
    model, batch = xlnet(), PLAIN.collator(TOKENIZER)(rows_of(2))
    labels = batch.pop("labels")
    with torch.no_grad():
        before = model(**batch).logits
        for row in range(2):
            for index, place in enumerate(batch["target_mapping"][row].argmax(-1).tolist()):
                hidden = batch["perm_mask"][row, place].bool()
                assert bool(hidden[place])
                for change, same in ((hidden, True), (~hidden, False)):
                    ids = batch["input_ids"].clone()
                    ids[row, change] = (ids[row, change] + 7) % 250
                    after = model(**{**batch, "input_ids": ids}).logits[row, index]
                    assert torch.allclose(after, before[row, index], atol=1e-5) == same
    assert before.shape == (*labels.shape, 263), "logits of predicted positions only"


def test_padding_changes_nothing() -> None:
    model, rows = xlnet(), rows_of(2)
    short = {**rows[1], "input_ids": rows[1]["input_ids"][:13]}
    alone, padded = PLAIN.collator(TOKENIZER)([short]), PLAIN.collator(TOKENIZER)([rows[0], short])
    alone.pop("labels"), padded.pop("labels")
    # the same order and targets, laid out in a longer row
    count = alone["target_mapping"].shape[1]
    padded["target_mapping"][1] = 0
    padded["target_mapping"][1, :count, :13] = alone["target_mapping"][0]
    padded["perm_mask"][1] = 0
    padded["perm_mask"][1, :13, :13] = alone["perm_mask"][0]
    with torch.no_grad():
        assert torch.allclose(model(**padded).logits[1, :count], model(**alone).logits[0], atol=1e-5)


def test_the_memory_is_carried_from_batch_to_batch(tmp_path) -> None:
    case = {"objective": "permutation", "data": "lanes", "workers": 0, "accumulation": 1}
    trainer = runs.trainer_of(case, str(tmp_path), max_steps=3, save_strategy="no")
    seen = []
    model = trainer.model
    handle = model.register_forward_pre_hook(lambda m, a, inputs: seen.append(inputs.get("mems")), with_kwargs=True)
    trainer.train()
    handle.remove()
    given = [mems for mems in seen if mems is not None]
    assert len(given) == 2 and given[0][0].shape == (runs.LENGTH, runs.BATCH, 16)
    assert not given[0][0].requires_grad


def test_a_row_with_its_memory_reads_on_where_the_last_row_ended() -> None:
    model = xlnet(mem_len=LENGTH)
    lanes = BPTTStreams(Dataset.from_dict({"text": texts(4)}), TOKENIZER, LENGTH, 2)
    learnt = objective("permutation", whole_word=False, memory=True)
    first, second = (learnt.collator(TOKENIZER)([lanes[2 * k], lanes[2 * k + 1]]) for k in (0, 1))
    with torch.no_grad():
        mems = model(**first, use_mems=True).mems
        carried = model(**second, mems=mems, use_mems=True).logits
        ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
        hidden = torch.zeros(2, 2 * LENGTH, 2 * LENGTH)
        hidden[:, :LENGTH, LENGTH:] = 1
        hidden[:, :LENGTH, :LENGTH], hidden[:, LENGTH:, LENGTH:] = first["perm_mask"], second["perm_mask"]
        mapping = torch.cat([torch.zeros_like(second["target_mapping"]), second["target_mapping"]], -1)
        whole = model(input_ids=ids, perm_mask=hidden, target_mapping=mapping).logits
    assert torch.allclose(carried, whole, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"permutation.* Models that fit 'permutation': xlnet"):
        PLAIN.check(BertConfig(), TOKENIZER)
    with pytest.raises(ValueError, match="memory=True needs a model with mem_len of 1 or more, got None"):
        objective("permutation", memory=True).check(XLNetConfig(mem_len=None), TOKENIZER)
    with pytest.raises(ValueError, match="whole_word must be false with memory=True"):
        objective("permutation", memory=True, whole_word=True)
    assert not objective("permutation", memory=True).by_words and objective("permutation").by_words
    with pytest.raises(ValueError, match="nothing to predict"):
        PLAIN.collator(TOKENIZER)([{"input_ids": [SEP, CLS], "example_id": 0}])
    for options, message in (({"rate": 0.0}, "rate"), ({"max_gram": 0}, "max_gram"), ({"perm_size": 1}, "perm_size")):
        with pytest.raises(ValueError, match=f"{message} must"):
            objective("permutation", **options)
