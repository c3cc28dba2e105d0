"""Tasks: what is learnt from labels. `task("sequence_classification")` builds one; `TASKS` lists them by name."""

from __future__ import annotations

from typing import Any

from ..objectives.base import built
from .base import Task
from .classification import SequenceClassification, TokenClassification
from .question_answering import MultipleChoice, QuestionAnswering
from .scores import MultiLabelClassification, Regression
from .text_to_text import TextToText

TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        SequenceClassification,
        MultiLabelClassification,
        Regression,
        TokenClassification,
        QuestionAnswering,
        MultipleChoice,
        TextToText,
    )
}
"""Name → class; a new task is one class and one entry."""

__all__ = ["TASKS", "Task", "task"]


def task(name: str, **options: Any) -> Task:
    """Build a task by name.

    Args:
        name: a key of `TASKS`.
        options: fields of the task's class.

    Raises:
        ValueError: an unknown name or option; names the known ones.
    """
    return built(TASKS, "task", name, options)
