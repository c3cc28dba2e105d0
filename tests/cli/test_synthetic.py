"""Synthetic tasks by name: on bits for memories, on tokens for every causal language model; their rows, and refusals."""

from __future__ import annotations

import json

import pytest
import torch

from hf_lnlm.data.algorithmic import TASKS, Curriculum, Stream
from hf_lnlm.data.token_tasks import TOKEN_TASKS, Parity, wrong_tokens
from hf_lnlm.flows.algorithm import TokenAlgorithm, measured_rows

from .running import run, settings, succeed

QUICK = ["training.max_steps=2", "training.save_steps=2", "training.eval_strategy=no", "training.use_cpu=true"]


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_rows_ask_for_what_the_earlier_tokens_tell(name):
    task = TOKEN_TASKS[name]()
    for row in measured_rows(task)[:8]:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) and int(ids.max()) < task.vocab_size
        asked = (labels[1:] != -100).nonzero().flatten()
        answers = labels[1:][asked]
        if name == "parity":
            assert answers.tolist() == [int(ids[: at + 1].sum()) % 2 for at in asked]
        elif name == "selective_copying":
            assert answers.tolist() == [token for token in ids[:64].tolist() if token]
        elif name == "multi_query_recall":
            pairs = dict(zip(ids[:8:2].tolist(), ids[1:8:2].tolist()))
            assert answers.tolist() == [pairs[int(ids[at])] for at in asked] and len(answers) == 4
        else:
            assert (ids[asked] == 15).all() and len(set(answers.tolist())) == 1
            assert (ids[asked + 1] == answers).all() and len(answers) == 7


def test_answers_are_counted_where_they_are_asked_and_sizes_grow():
    batch = TokenAlgorithm(Parity()).collator(None)(measured_rows(Parity(), 5)[:3])
    logits = torch.nn.functional.one_hot(batch["labels"].roll(-1, 1).clamp(min=0), 2).float()
    assert wrong_tokens(logits, batch["labels"]).tolist() == [0, 0, 0]
    logits[0, 2] = 1 - logits[0, 2]
    assert wrong_tokens(logits, batch["labels"]).tolist() == [1, 0, 0]
    learnt = TokenAlgorithm(Parity())
    assert learnt.summary(learnt.sums(logits, batch)) == pytest.approx({"wrong_tokens": 1 / 3, "accuracy": 14 / 15})
    curriculum = Curriculum(Stream(Parity(), 2, 0, 8), 0.5)
    curriculum.observe(logits, batch["labels"])
    assert curriculum.stream.longest == 12


@pytest.mark.parametrize("family", ["lnlm_ssm", "lnlm_gpt3", "gpt2"])
def test_causal_models_learn_tasks_on_tokens(family, tmp_path):
    words = ["pretrain", "--family", family, "--data", "synthetic:parity", "--output", tmp_path / "run"]
    succeed(*words, *settings(*QUICK, "objective.tested=60", "objective.first=8"))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["data"] == "64 rows of parity, size 60" and 0 < found["metrics"]["accuracy"] < 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["vocab_size"] == 2
    assert "tokens_per_second" in (tmp_path / "run" / "metrics.csv").read_text()


def test_names_stand_in_a_list_and_what_does_not_fit_is_refused(tmp_path):
    listed = json.loads(succeed("list", "--synthetic", "--json").out)
    assert [row["name"] for row in listed] == [*TASKS, *TOKEN_TASKS] and all(row["title"] for row in listed)
    for words, said in (
        (
            ["--family", "lnlm_ssm", "--data", "synthetic:parrot"],
            "unknown synthetic task 'parrot' (did you mean 'parity'?)",
        ),
        (["--family", "lnlm_ssm", "--data", "synthetic:copy"], "needs one of lnlm_ntm, lnlm_dnc"),
        (["--family", "bert", "--data", "synthetic:parity"], "needs a causal language model (lnlm_rnn"),
        (
            ["--family", "lnlm_ssm", "--data", "synthetic:parity", "--objective", "masked"],
            "learnt as objective 'parity'",
        ),
        (
            ["--family", "lnlm_ssm", "--objective", "parity", "--set", "objective.length=3"],
            "unknown key objective.length",
        ),
    ):
        result = run("pretrain", *words, "--output", tmp_path / "out")
        assert result.status == 2 and said in result.err, (said, result.err)
