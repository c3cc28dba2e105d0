"""One step of a tiny model on one global batch of eight rows, cut in different ways."""

import random
from typing import Any

import torch
import transformers as T

from hf_lnlm.objectives import objective
from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.trainer import LNLMTrainer
from tests.contract import cases as contract
from tests.trainer import families

COMPOSED = ("replaced_token", "sentence_order", "next_sentence", "bidirectional")
"""Objectives with a model made of several and a loss of two terms."""
OURS = {str(case): case for case in contract.cases(loss=True)}


def trainer(model: Any, rows: Any, folder: str, batch: int, accumulation: int, **changed: Any) -> LNLMTrainer:
    """Build a quiet trainer for one step, unless the arguments say otherwise."""
    arguments = LNLMTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=1e9,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"max_steps": 1, "save_strategy": "no", **changed},
    )
    evaluated = rows if changed.get("eval_strategy", "no") != "no" else None
    built = LNLMTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=evaluated)
    built.remove_callback(T.PrinterCallback)
    return built


def step(model: Any, rows: Any, folder: str, batch: int, accumulation: int, **changed: Any) -> LNLMTrainer:
    """Train one step and return the trainer; its first log entry holds loss and gradient norm."""
    built = trainer(model, rows, folder, batch, accumulation, **changed)
    built.train()
    return built


def heads() -> list[str]:
    """Return the names of all heads with a loss, stock and ours."""
    return [*families.HEADS, *COMPOSED, *OURS]


def few() -> list[str]:
    """Return one head for each way in which a loss is made, and one of each family of ours."""
    stock = [
        "GPT2LMHeadModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "AlbertForPreTraining",
        "ElectraForPreTraining",
    ]
    stock += ["T5ForConditionalGeneration", "XLNetLMHeadModel", "RobertaForSequenceClassification"]
    stock += ["GPT2ForTokenClassification", "XLNetForQuestionAnswering", "BertForQuestionAnswering"]
    return [*stock, "replaced_token", "bidirectional", *map(str, contract.one_case_a_family())]


def build(head: str) -> tuple[Any, Any]:
    """Return a seeded tiny model and eight rows for it."""
    if head in COMPOSED:
        return composed(head)
    if head in OURS:
        return contract.build(OURS[head], use_cache=False), contract.rows_of(OURS[head])
    return families.build(head)


def composed(goal: str) -> tuple[Any, Any]:
    """Return a seeded composed model and eight rows with unequal numbers of items."""
    generator = random.Random(1)
    rows = [families.masked(row, generator) for row in range(8)]
    if goal == "bidirectional":
        rows = [
            {**row, "labels": [i if m else -100 for i, m in zip(row["input_ids"], row["attention_mask"])]}
            for row in rows
        ]
    for row in rows:
        row["uniforms"] = [generator.random() for _ in row["input_ids"]]
        row |= {f"{goal}_label": generator.randrange(2)} if goal in ("sentence_order", "next_sentence") else {}
    sizes = {"vocab_size": families.VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
    config = T.AutoConfig.for_model("lnlm_rnn", **sizes, bidirectional=goal != "bidirectional")
    torch.manual_seed(0)
    return objective(goal, **({"generator_fraction": 0.5} if goal == "replaced_token" else {})).build(config), rows


def loss_and_norm(head: str, folder: str, batch: int, accumulation: int) -> tuple[float, float]:
    """Return the loss and the gradient norm of the first step of a head."""
    model, rows = build(head)
    entry = step(model, rows, folder, batch, accumulation).state.log_history[0]
    return entry["loss"], entry["grad_norm"]
