"""One step of a tiny model on one global batch of eight rows, cut in different ways."""

from typing import Any

import transformers as T

from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.trainer import LNLMTrainer
from tests.contract import cases as contract
from tests.trainer import families

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
    return [*families.HEADS, *OURS]


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
    return [*stock, *map(str, contract.one_case_a_family())]


def build(head: str) -> tuple[Any, Any]:
    """Return a seeded tiny model and eight rows for it."""
    if head in OURS:
        return contract.build(OURS[head], use_cache=False), contract.rows_of(OURS[head])
    return families.build(head)


def loss_and_norm(head: str, folder: str, batch: int, accumulation: int) -> tuple[float, float]:
    """Return the loss and the gradient norm of the first step of a head."""
    model, rows = build(head)
    entry = step(model, rows, folder, batch, accumulation).state.log_history[0]
    return entry["loss"], entry["grad_norm"]
