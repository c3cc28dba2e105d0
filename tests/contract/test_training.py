"""Training with the stock Trainer: accumulation, resumption, checkpointing, bfloat16, every head of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

import hf_lnlm
from hf_lnlm.models import heads
from hf_lnlm.nn.inputs import CACHE_FIELD

from .cases import (
    VOCABULARY,
    Case,
    build,
    cases,
    first_output,
    inputs_of,
    labels_of,
    main_output,
    one_case_a_family,
    rows_of,
    token_ids,
)

one_loss_case = pytest.mark.parametrize("case", cases(loss=True), ids=str)  # one term, one number of items
loss_case = pytest.mark.parametrize("case", cases(loss=True, composed=True), ids=str)
every_case = pytest.mark.parametrize("case", cases(composed=True), ids=str)


def train(model: Any, rows: list[dict], folder: Any, resume: str | None = None, **arguments: Any) -> Any:
    common = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 1,
    }
    kinds: Any = (Trainer, TrainingArguments)
    if hasattr(model, "counts_load"):  # the load of a whole step is known to our Trainer only
        kinds = (hf_lnlm.LNLMTrainer, hf_lnlm.LNLMTrainingArguments)
    trainer = kinds[0](
        model=model,
        args=kinds[1](**(common | arguments)),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@one_loss_case
def test_accumulated_batches_equal_one_big_batch(case: Case, tmp_path):
    rows, trained = rows_of(case), []
    for accumulation in (1, 4):
        model = build(case, use_cache=False)
        sgd = {
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 1,
        }
        batch = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = train(model, rows, tmp_path, **sgd, **batch)
        trained.append(model.state_dict() | {"loss": torch.tensor(trainer.state.log_history[0]["loss"])})
    for name, value in trained[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, trained[1][name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@one_loss_case
def test_num_items_divides_the_loss(case: Case):
    model = build(case, use_cache=False)
    inputs = inputs_of(case, batch=4)
    inputs |= labels_of(case, inputs)
    with torch.no_grad():
        losses = [model(**inputs, num_items_in_batch=torch.tensor(items)).loss for items in (5, 10)]
    torch.testing.assert_close(losses[0], 2 * losses[1], rtol=1e-5, atol=1e-7)


def resume_cases() -> list:
    chosen = one_case_a_family()
    return [
        pytest.param(c, id=str(c), marks=pytest.mark.core if c in chosen else pytest.mark.slow)
        for c in cases(loss=True, both_ways=False)
    ]


@pytest.mark.parametrize("case", resume_cases())
def test_resumed_run_equals_the_straight_one(case: Case, tmp_path):
    rows = rows_of(case, count=12)
    arguments = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
    }
    straight = train(build(case), rows, tmp_path, **arguments)
    resumed = train(build(case, seed=77), rows, tmp_path, resume=str(tmp_path / "checkpoint-2"), **arguments)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    predictions = straight.predict(rows).predictions
    first = predictions[0] if isinstance(predictions, tuple) else predictions
    assert len(first) == len(rows)
    assert straight.evaluate(rows)["eval_loss"] > 0


@loss_case
def test_every_parameter_gets_a_gradient(case: Case):
    model = build(case, use_cache=False).train()
    inputs = inputs_of(case, batch=6, length=12)
    model(**inputs, **labels_of(case, inputs)).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not dead


@every_case
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(case: Case, reentrant: bool):
    inputs = inputs_of(case, batch=3)
    if case.has_loss:
        inputs |= labels_of(case, inputs)
    gradients = []
    for checkpointing in (False, True):
        model = build(case).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # the name that every version has
            assert model.is_gradient_checkpointing
        if reentrant:
            model.enable_input_require_grads()
        outputs = model(**inputs)
        (outputs.loss if case.has_loss else main_output(outputs).square().mean()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_case
def test_bfloat16(case: Case):
    inputs = inputs_of(case, batch=3)
    wanted = first_output(build(case), **inputs)
    model = build(case).to(torch.bfloat16).train()
    outputs = model(**inputs, **(labels_of(case, inputs) if case.has_loss else {}))
    found = main_output(model.eval()(**inputs))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() <= 0.1 * wanted.norm()
    (outputs.loss if case.has_loss else main_output(outputs).float().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_case
def test_autocast(case: Case):
    inputs = inputs_of(case, batch=3)
    model = build(case)
    wanted = first_output(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs, **(labels_of(case, inputs) if case.has_loss else {}))
        found = main_output(model(**inputs) if case.composed else outputs)  # a detector reads other tokens with labels
    assert (found.float() - wanted).norm() <= 0.1 * wanted.norm()
    (outputs.loss if case.has_loss else found.float().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", cases(causal=True), ids=str)
def test_loss_is_the_shifted_cross_entropy(case: Case):
    model = build(case)
    inputs = inputs_of(case, batch=3)
    labels = labels_of(case, inputs)["labels"]
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        given = model(**inputs, labels=labels.flip(1), shift_labels=shifted).loss
    wanted = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)


vocabulary_case = pytest.mark.parametrize(
    "case", [c for c in cases() if c.generates or c.auto == "AutoModelForMaskedLM"], ids=str
)


@vocabulary_case
def test_chunked_head_equals_the_full_one(case: Case):
    inputs = inputs_of(case, batch=3)
    inputs |= labels_of(case, inputs)
    found = []
    for head in ("full", "chunked"):
        model = build(case, loss_head=head, loss_chunk_size=4).train()
        outputs = model(**inputs, num_items_in_batch=7)
        outputs.loss.backward()
        assert (outputs.logits is None) == (head == "chunked")
        found.append({"loss": outputs.loss.detach()} | {n: p.grad for n, p in model.named_parameters()})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@vocabulary_case
def test_many_logits_are_left_out_by_themselves(case: Case, monkeypatch: pytest.MonkeyPatch):
    """`loss_head="auto"`, the default: full up to `MOST_LOGITS` numbers, chunked above, the same loss and gradients."""
    inputs = inputs_of(case, batch=3)
    inputs |= labels_of(case, inputs)
    count, found = inputs["labels"].numel() * VOCABULARY, []
    for most in (count, count - 1):
        monkeypatch.setattr(heads, "MOST_LOGITS", most)
        model = build(case, loss_chunk_size=4).train()
        outputs = model(**inputs, num_items_in_batch=7)
        outputs.loss.backward()
        assert (outputs.logits is None) == (most < count)
        assert model.eval()(**inputs).logits is not None
        found.append({"loss": outputs.loss.detach()} | {n: p.grad for n, p in model.named_parameters()})
    for name, wanted in found[0].items():
        assert (found[1][name] - wanted).norm() <= 1e-6 * (1.0 + wanted.norm()), name


@vocabulary_case
def test_adaptive_head_is_one_distribution(case: Case):
    fields = {"loss_head": "adaptive", "adaptive_cutoffs": [20, 40], "adaptive_div_value": 2}
    model = build(case, tie_word_embeddings=False, **fields)
    inputs = inputs_of(case, batch=3)
    inputs |= labels_of(case, inputs)
    evaluated = model(**inputs)
    torch.testing.assert_close(evaluated.logits.logsumexp(-1), torch.zeros(3, 9), atol=1e-5, rtol=0)
    trained = model.train()(**inputs)
    assert trained.logits is None
    routed = trained.get("aux_loss") or 0.0  # is not in the loss of evaluation
    torch.testing.assert_close(trained.loss - routed, evaluated.loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="adaptive softmax cannot be resized"):
        model.resize_token_embeddings(99)


@vocabulary_case
@pytest.mark.parametrize("wrong", ["beyond", "negative", "transposed", "flat", "fractions"])
def test_labels_that_are_no_tokens_are_refused(case: Case, wrong: str):
    inputs = inputs_of(case)
    ids = inputs["input_ids"]
    labels = {
        "beyond": torch.full_like(ids, VOCABULARY),
        "negative": torch.full_like(ids, -1),
        "transposed": ids.T,
        "flat": ids.flatten(),
        "fractions": ids.float(),
    }[wrong]
    with pytest.raises(ValueError, match="labels must") as refusal:
        build(case)(**inputs, labels=labels)
    if wrong == "beyond":
        assert f"between 0 and {VOCABULARY - 1}" in str(refusal.value)


@pytest.mark.parametrize("case", [c for c in cases(loss=True) if "SequenceClassification" in c.auto], ids=str)
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification", "single_label_classification"])
def test_problem_types(case: Case, kind: str):
    model = build(case, problem_type=kind, num_labels=1 if kind == "regression" else 3)
    inputs = inputs_of(case, batch=4)
    labels = {
        "regression": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        "single_label_classification": torch.tensor([0, 1, 2, 1]),
    }[kind]
    with torch.no_grad():
        whole = model(**inputs, labels=labels).loss
        count = labels.numel()
        halves = [
            model(**{k: v[part] for k, v in inputs.items()}, labels=labels[part], num_items_in_batch=count).loss
            for part in (slice(0, 1), slice(1, 4))
        ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "hybrid"), [(c, h) for c in cases(causal=True) for h in {False, c.family.name == "ssm"}], ids=str
)
def test_gradient_checkpointing_with_a_past_is_the_same_or_refused(case: Case, hybrid: bool):
    """Recurrent states may be given; keys and values, which a second run of the layer would extend again, may not."""
    fields: dict[str, Any] = {"attn_layer_indices": [1]} if hybrid else {}
    first, second, losses = token_ids(2, 5), token_ids(2, 4, seed=9), []
    for on in (False, True):
        model = build(case, **fields).train()
        with torch.no_grad():
            past = model(input_ids=first, use_cache=True)[CACHE_FIELD]
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if on and (fields or case.family.takes_prefix):
            with pytest.raises(ValueError, match="gradient checkpointing runs a layer twice"):
                model(input_ids=second, past_key_values=past, labels=second)
            return
        loss = model(input_ids=second, past_key_values=past, labels=second).loss
        loss.backward()
        losses.append([loss.item(), sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
