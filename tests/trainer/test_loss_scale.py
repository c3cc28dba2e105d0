"""Loss and gradient norm don't depend on how a global batch is cut: accumulation, processes, heads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from hf_lnlm.trainer.loss_scale import DeclaredParts, HonoursItems, LossProbe, MeanOfItems, SumOfParts
from tests.contract import cases as contract
from tests.trainer import distributed, families, runs, scale


def two_processes(root: Path, folder: Path, heads: list[str], *options: str) -> dict[str, Any]:
    """Return the answers of tests.trainer.distributed under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.trainer.distributed", str(folder), json.dumps(heads), *options],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())


def compare(found: dict[str, Any], heads: list[str], folder: Path) -> None:
    """Compare two processes and four micro-batches with the whole batch at once."""
    assert list(found) == heads
    for head in heads:
        whole = scale.loss_and_norm(head, str(folder / "one"), batch=8, accumulation=1)
        cut = scale.loss_and_norm(head, str(folder / "one"), batch=2, accumulation=4)
        assert cut == pytest.approx(whole, rel=1e-4), f"{head}: accumulation"
        assert found[head] == pytest.approx(whole, rel=1e-4), f"{head}: two processes"


def test_two_processes(repository: Path, tmp_path: Path) -> None:
    heads = scale.few()
    answers = two_processes(repository, tmp_path, heads, "--sharing")
    compare(answers["loss_scale"], heads, tmp_path)
    assert answers["terminated"] == [143, ["checkpoint-3"]]
    for name in ("resumed", "resumed_stream", "resumed_lanes"):
        assert answers[name][0] == answers[name][1], name
    assert answers["lanes"] == pytest.approx(lanes_of_one_process(tmp_path), rel=1e-5)
    assert answers["evaluated"] == pytest.approx(evaluated_by_hand(), rel=1e-5)
    alone = distributed.answered(str(tmp_path / "answered"), 5)
    assert alone["f1"] > 0 and answers["answered"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_every_head_in_two_processes(repository: Path, tmp_path: Path) -> None:
    heads = scale.heads()
    compare(two_processes(repository, tmp_path, heads)["loss_scale"], heads, tmp_path)


def lanes_of_one_process(folder: Path) -> list[float]:
    """Return the losses of all lanes in one process, as two processes share them."""
    case = {"objective": "causal", "data": "lanes", "workers": 0, "accumulation": 1, "dropout": 0.0}
    rows = 2 * runs.BATCH
    changed = {"logging_steps": 1, "max_steps": 6, "save_strategy": "no", "per_device_train_batch_size": rows}
    trainer = runs.trainer_of({**case, "lanes": rows}, str(folder / "lanes"), **changed)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def evaluated_by_hand() -> float:
    """Return the mean over all labels of seven rows, from their logits."""
    model, rows = families.build("BertForMaskedLM")
    model.eval()
    batch = {name: torch.tensor([row[name] for row in rows[:7]]) for name in rows[0]}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))


def rule_of(head: str, passes_kwargs: bool = True) -> Any:
    """Return what the probe finds for a stock head."""
    model, rows = families.build(head)
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    shifts = getattr(model, "loss_type", None) == "ForCausalLM"
    return LossProbe(model, batch, passes_kwargs, shifts).rule()


@pytest.mark.parametrize(
    ("head", "rule"),
    [
        ("LlamaForCausalLM", HonoursItems("labels after the shift")),
        ("GPT2LMHeadModel", HonoursItems("labels after the shift")),
        ("BertForMaskedLM", MeanOfItems("labels")),
        ("T5ForConditionalGeneration", MeanOfItems("labels")),
        ("ElectraForPreTraining", MeanOfItems("attended tokens")),
        ("XLNetForQuestionAnswering", MeanOfItems("rows")),
    ],
)
def test_the_probe_finds_what_a_head_counts(head: str, rule: Any) -> None:
    assert rule_of(head) == rule


def test_heads_with_two_terms_are_computed_by_parts() -> None:
    assert [part.logits for part in rule_of("BertForPreTraining").parts] == [
        "prediction_logits",
        "seq_relationship_logits",
    ]
    assert isinstance(rule_of("AlbertForPreTraining"), SumOfParts)
    assert isinstance(rule_of("LlamaForQuestionAnswering"), SumOfParts)


def test_the_probe_leaves_no_trace() -> None:
    model, rows = families.build("BertForMaskedLM")
    model.bert.register_buffer("calls", torch.zeros(()))

    def counting(module: nn.Module, inputs: Any) -> None:
        module.calls += 1

    model.bert.register_forward_pre_hook(counting)
    model.train()
    model.bert.encoder.eval()
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    before = torch.random.get_rng_state()
    LossProbe(model, batch, True, False).rule()
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.bert.calls == 0
    assert model.training and not model.bert.encoder.training
    assert all(parameter.grad is None for parameter in model.parameters())


class TwoTerms(nn.Module):
    """A model that declares two terms over different items."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 3))

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any, **kwargs: Any) -> dict[str, Any]:
        logits = self.weight[input_ids]
        return {"loss": logits.sum() * 0, "logits": logits}

    def loss_items(self, inputs: Any) -> dict[str, torch.Tensor]:
        return {"tag": inputs["labels"].ne(-100).sum(), "size": inputs["attention_mask"].sum()}

    def loss_sums(self, outputs: Any, inputs: Any) -> dict[str, torch.Tensor]:
        logits = outputs["logits"].flatten(0, 1)
        tag = nn.functional.cross_entropy(logits, inputs["labels"].flatten(), reduction="sum")
        size = (outputs["logits"].pow(2).mean(-1) * inputs["attention_mask"]).sum()
        return {"tag": tag, "size": 5.0 * size}


def test_a_model_declares_its_terms(tmp_path: Path) -> None:
    rows = families.build("BertForTokenClassification")[1]
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        trainer = scale.step(TwoTerms(), rows, str(tmp_path), batch, accumulation)
        assert isinstance(trainer._loss_rule, DeclaredParts)
        entry = trainer.state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"]))
    torch.manual_seed(0)
    model = TwoTerms()
    inputs = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    items, sums = model.loss_items(inputs), model.loss_sums(model(**inputs), inputs)
    expected = sum(sums[name].item() / items[name].item() for name in items)
    assert found[0][0] == pytest.approx(expected, rel=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "LlamaForCausalLM", "BertForPreTraining"])
def test_a_micro_batch_without_labels_adds_nothing(head: str, tmp_path: Path) -> None:
    model, rows = families.build(head)
    for row in rows[:2]:
        row["labels"] = [-100] * families.LENGTH
    entry = scale.step(model, rows, str(tmp_path), 2, 4).state.log_history[0]
    model, _ = families.build(head)
    whole = scale.step(model, rows, str(tmp_path), 8, 1).state.log_history[0]
    assert (entry["loss"], entry["grad_norm"]) == pytest.approx((whole["loss"], whole["grad_norm"]), rel=1e-4)


def test_label_smoothing_and_loss_functions_stay_stock(tmp_path: Path) -> None:
    model, rows = families.build("BertForMaskedLM")
    trainer = scale.step(model, rows, str(tmp_path), 2, 4, label_smoothing_factor=0.1)
    assert trainer._loss_rule is None
    assert T.Trainer.compute_loss is not type(trainer).compute_loss
    model, _ = families.build("BertForMaskedLM")
    whole = scale.step(model, rows, str(tmp_path), 8, 1, label_smoothing_factor=0.1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-4)


def test_penalties_on_activations_are_part_of_the_mean(tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        case = scale.OURS["rnn-ForCausalLM"]
        model = contract.build(case, use_cache=False, activation_penalty=2.0, temporal_penalty=1.0)
        entry = scale.step(model, contract.rows_of(case), str(tmp_path), batch, accumulation).state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][0] > 1.01 * scale.loss_and_norm("rnn-ForCausalLM", str(tmp_path), 8, 1)[0]


def test_training_on_no_label_at_all_is_refused(tmp_path: Path) -> None:
    model, rows = families.build("BertForMaskedLM")
    rows = [{**row, "labels": [-100] * families.LENGTH} for row in rows]
    with pytest.raises(ValueError, match=r"0 of 48 labels \(0 %\) of the first step count: all are -100"):
        scale.step(model, rows, str(tmp_path), 4, 1)


def test_evaluation_may_begin_without_labels(tmp_path: Path) -> None:
    model, rows = families.build("BertForMaskedLM")
    hidden = [{**row, "labels": [-100] * families.LENGTH} for row in rows]
    trainer = scale.trainer(model, rows, str(tmp_path), 4, 1, per_device_eval_batch_size=4)
    assert trainer.evaluate(hidden)["eval_loss"] == 0
    assert trainer._loss_rule is None
    mixed, plain = trainer.evaluate(hidden[:4] + rows), trainer.evaluate(rows)
    assert trainer._loss_rule == MeanOfItems("labels")
    assert mixed["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_one_flat_row_of_documents_is_measured_as_it_is() -> None:
    model, rows = families.build("LlamaForCausalLM")
    flat = torch.tensor([rows[0]["input_ids"] + rows[1]["input_ids"]])
    positions = torch.arange(families.LENGTH).repeat(2)[None]
    starts = torch.tensor([0, families.LENGTH, 2 * families.LENGTH], dtype=torch.int32)
    batch = {"input_ids": flat, "position_ids": positions, "labels": flat, "cu_seq_lens_q": starts}
    assert LossProbe(model, batch, True, True).rule() == HonoursItems("labels after the shift")
    model, rows = families.build("BertForMaskedLM")
    batch = {name: torch.tensor([rows[5][name]]) for name in rows[5]}
    assert LossProbe(model, {**batch, "return_dict": True}, True, False).rule() == MeanOfItems("labels")


def test_shifted_labels_that_are_given_are_counted() -> None:
    model, rows = families.build("LlamaForCausalLM")
    ids = torch.tensor([row["input_ids"] for row in rows])
    shifted = ids.roll(-1, 1)
    shifted[:3, 5:] = -100
    rule = LossProbe(model, {"input_ids": ids, "labels": ids, "shift_labels": shifted}, True, True).rule()
    assert rule == HonoursItems("labels after the shift")
    assert rule.count({"labels": ids, "shift_labels": shifted}).tolist() == [int(shifted.ne(-100).sum())]
