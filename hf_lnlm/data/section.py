"""The data section of a recipe: where examples come from, the names of their columns, and how text is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class DataSection:
    """Where the examples come from and how they are cut; columns are named for labelled data."""

    source: str | list[str] | None = None
    text_column: str = "text"
    validation: float | str | None = None
    unit: Literal["file", "line"] = "file"
    streaming: bool = False
    encoding: str = "utf-8"
    errors: Literal["strict", "replace", "ignore"] = "strict"
    mode: Literal["auto", "blocks", "lanes"] = "auto"
    frame: Literal["both", "start", "end", "none"] = "both"
    block_size: int | None = None
    limit: int | None = None
    label_column: str = "label"
    pair_column: str | None = None
    tokens_column: str = "tokens"
    tags_column: str = "tags"
    source_column: str = "source"
    target_column: str = "target"
    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    choices_column: str = "choices"
    quoted: bool | None = None
    skip_bad_rows: bool = False
