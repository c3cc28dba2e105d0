"""Tasks that read a question: the answer as a stretch of a text, which may be long, and one of several choices.

A text longer than a row is cut into windows that overlap, so that no answer is lost at a border. In training every window
is a row of its own; in measuring all windows of a question stay together, and the best stretch over all of them counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..data.labelled import Row
from ..objectives.base import Batch, pad_id
from .recipe import DataSection
from .task import Task, is_list, padded_inputs, summed_nll, tells_texts_apart

NOWHERE = 0
"""Where a window without the answer points: its first token, which is never one of the text's."""

Span = tuple[int, int] | None


@dataclass(frozen=True)
class Window:
    """A row of the model: the question and a part of the text.

    Attributes:
        inputs: `input_ids` and perhaps `token_type_ids`.
        spans: for each token its (start, end) in the text in characters; None if it is none of the text's.
    """

    inputs: dict[str, list[int]]
    spans: list[Span]

    def place(self, start: int, end: int) -> tuple[int, int]:
        """First and last token of the characters start … end − 1; both `NOWHERE` unless all of them are here."""
        inside = [i for i, span in enumerate(self.spans) if span is not None and span[0] < end and span[1] > start]
        whole = inside and self.spans[inside[0]][0] <= start and self.spans[inside[-1]][1] >= end  # type: ignore[index]
        return (inside[0], inside[-1]) if whole else (NOWHERE, NOWHERE)


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The answer to a question, as a stretch of a text.

    Args:
        stride: tokens that a window shares with the one before.
        longest_answer: most tokens of an answer.
    """

    name: ClassVar[str] = "question_answering"
    title: ClassVar[str] = "Answer within a text"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    lora_type: ClassVar[str] = "QUESTION_ANS"

    stride: int = 32
    longest_answer: int = 30
    table: tuple[Row, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if self.stride < 0 or self.longest_answer < 1:
            raise ValueError(
                f"stride must be 0 or more and longest_answer 1 or more, got {self.stride} and {self.longest_answer}"
            )

    def columns(self, data: DataSection) -> list[str]:
        """Question, text and answers."""
        return [data.question_column, data.context_column, data.answers_column]

    def texts(self, rows: Sequence[Row], data: DataSection) -> Any:
        """Questions and texts; answers are parts of the texts."""
        return (str(row[column]) for row in rows for column in (data.question_column, data.context_column))

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """One row a window: `input_ids`, `start_positions`, `end_positions`; counts answers that fit into no window."""
        encoded: list[Row] = []
        lost = 0
        for number, row in enumerate(rows, start=1):
            windows = self._windows(row, data, tokenizer, config, length, number)
            found = answers_of(row, data, number)
            places = _places(windows, found)
            lost += bool(found) and set(places) == {(NOWHERE, NOWHERE)}
            for window, (first, last) in zip(windows, places):
                encoded.append({**window.inputs, "start_positions": first, "end_positions": last})
        return encoded, lost

    def encode_held(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """One row a question, with all `windows`, the `context` and the `answers`; nothing is cut."""
        encoded: list[Row] = []
        for number, row in enumerate(rows, start=1):
            windows = self._windows(row, data, tokenizer, config, length, number)
            found = answers_of(row, data, number)
            encoded.append(
                {
                    "number": number - 1,
                    "windows": windows,
                    "places": _places(windows, found),
                    "context": str(row[data.context_column]),
                    "answers": [answer for _, answer in found],
                }
            )
        return encoded, 0

    def _windows(
        self, row: Row, data: DataSection, tokenizer: Any, config: Any, length: int, number: int
    ) -> list[Window]:
        question, context = str(row[data.question_column]), str(row[data.context_column])
        if not question.strip() or not context.strip():
            raise ValueError(f"row {number}: an empty question or text")
        question = _shortened(question, tokenizer, length // 2)
        room = length - len(tokenizer(question, "", verbose=False)["input_ids"])
        if room <= self.stride:
            raise ValueError(
                f"objective.stride is {self.stride}, but a question leaves {room} of data.block_size={length} tokens for "
                "the text: lower it, or raise data.block_size"
            )
        found = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        names = ["input_ids", *(["token_type_ids"] if tells_texts_apart(config) and "token_type_ids" in found else [])]
        windows = []
        for index, offsets in enumerate(found["offset_mapping"]):
            owners = found.encodings[index].sequence_ids
            spans = [tuple(span) if owner == 1 and span[1] > span[0] else None for span, owner in zip(offsets, owners)]
            windows.append(Window({name: found[name][index] for name in names}, spans))
        return windows

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function from encoded rows to a batch of windows."""
        return WindowCollator(tokenizer, bookkeeping)

    def measuring(self, rows: Sequence[Row]) -> Self:
        """The task with the texts and answers of the rows it will be measured on."""
        return self._with(table=tuple(rows))

    def logits(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """Start and end logits, `[windows, tokens, 2]`."""
        if outputs.get("start_logits") is None:
            return None
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Questions, exact matches and summed F1; `logits` is `[windows, tokens, 2]`."""
        total = torch.zeros(3, dtype=torch.float64)
        numbers = batch["example"].tolist()
        scores = logits.detach().float().cpu()
        nulls = not all(row["answers"] for row in self.table)
        for number in dict.fromkeys(numbers):
            if number < 0:  # it only fills up a process's last batch
                continue
            row = self.table[number]
            mine = [index for index, owner in enumerate(numbers) if owner == number]
            guess = best_answer(scores[mine], row, self.longest_answer, nulls)
            total += torch.tensor([1.0, exact_match(guess, row["answers"]), word_f1(guess, row["answers"])])
        return {"answers": total.to(logits.device)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`exact_match` and `f1`, shares of 1, over questions."""
        questions, exact, f1 = sums["answers"].tolist()
        return {"exact_match": exact / questions, "f1": f1 / questions}


@dataclass(frozen=True)
class WindowCollator:
    """Pads windows on the right; rows of questions are taken apart into their windows.

    Args:
        tokenizer: gives the pad token's id.
        bookkeeping: adds `example` `[windows]`, the number of each window's question, and `row` `[windows]`, the place of
            that question in the batch.
    """

    tokenizer: Any
    bookkeeping: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch: integers `[windows, tokens]`, `start_positions` and `end_positions` `[windows]`."""
        if "windows" not in rows[0]:
            batch = padded_inputs(rows, self.tokenizer)
            return batch | {
                name: torch.tensor([r[name] for r in rows]) for name in ("start_positions", "end_positions")
            }
        windows = [window for row in rows for window in row["windows"]]
        places = torch.tensor([place for row in rows for place in row["places"]])
        batch = padded_inputs([window.inputs for window in windows], self.tokenizer)
        batch |= {"start_positions": places[:, 0], "end_positions": places[:, 1]}
        if self.bookkeeping:
            counts = torch.tensor([len(row["windows"]) for row in rows])
            batch["example"] = torch.tensor([row["number"] for row in rows]).repeat_interleave(counts)
            batch["row"] = torch.arange(len(rows)).repeat_interleave(counts)
        return batch


def _places(windows: Sequence[Window], answers: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last token of the first answer in each window."""
    if not answers:
        return [(NOWHERE, NOWHERE)] * len(windows)
    start, text = answers[0]
    return [window.place(start, start + len(text)) for window in windows]


def _shortened(text: str, tokenizer: Any, length: int) -> str:
    """At most `length` tokens of a text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= length else text[: offsets[length - 1][1]]


def answers_of(row: Row, data: DataSection, number: int) -> list[tuple[int, str]]:
    """(start in the text, answer) of every answer of a row; none for a question without an answer.

    Answers are written as in SQuAD (`{"text": […], "answer_start": […]}`), as a list of texts, or as one text; where no
    start is given the first place counts.

    Raises:
        ValueError: an answer is not in the text, or starts and answers differ in number.
    """
    given, context = row[data.answers_column], str(row[data.context_column])
    starts: list[int] | None = None
    if isinstance(given, Mapping):
        starts = list(given["answer_start"]) if given.get("answer_start") is not None else None
        given = given.get("text", [])
    texts = [str(text) for text in given] if is_list(given) else [str(given)] if given not in (None, "") else []
    if starts is not None and len(starts) != len(texts):
        raise ValueError(f"row {number}: {len(texts)} answers but {len(starts)} starts")
    found = []
    for index, text in enumerate(texts):
        start = context.find(text) if starts is None else int(starts[index])
        if not text or start < 0 or context[start : start + len(text)] != text:
            raise ValueError(f"row {number}: the answer {text!r} is not in the text")
        found.append((start, text))
    return found


def best_answer(scores: Tensor, row: Row, longest: int, nulls: bool) -> str:
    """The best stretch of a text over all windows, or nothing where that scores higher.

    Args:
        scores: `[windows, tokens, 2]`, start and end logits.
        row: a question's `windows` and `context`.
        longest: most tokens of an answer.
        nulls: whether a question may have no answer.
    """
    best, text = -torch.inf, ""
    nothing = torch.inf
    for window, (starts, ends) in zip(row["windows"], scores.mT):
        nothing = min(nothing, float(starts[NOWHERE] + ends[NOWHERE]))
        inside = torch.tensor([span is not None for span in window.spans])
        count = len(inside)
        pairs = starts[:count, None] + ends[None, :count]
        allowed = (inside[:, None] & inside[None, :]).triu().tril(longest - 1)
        if not bool(allowed.any()):
            continue
        place = int(pairs.masked_fill(~allowed, -torch.inf).argmax())
        first, last = divmod(place, count)
        if float(pairs[first, last]) > best:
            best = float(pairs[first, last])
            text = row["context"][window.spans[first][0] : window.spans[last][1]]
    return "" if nulls and nothing > best else text.strip()


def _normal(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD compares them."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(guess: str, answers: Sequence[str]) -> float:
    """1 if a guess is one of the answers, up to case, punctuation and articles; without answers, if it is empty."""
    return float(any(_normal(guess) == _normal(answer) for answer in answers or [""]))


def word_f1(guess: str, answers: Sequence[str]) -> float:
    """Highest F1 of the words of a guess against an answer; without answers 1 for an empty guess."""
    return max(_f1(_normal(guess), _normal(answer)) for answer in answers or [""])


def _f1(guess: list[str], answer: list[str]) -> float:
    if not guess or not answer:
        return float(guess == answer)
    same = sum((Counter(guess) & Counter(answer)).values())
    return 2 * same / (len(guess) + len(answer))


@dataclass(frozen=True)
class MultipleChoice(Task):
    """The right one of several continuations of a text."""

    name: ClassVar[str] = "multiple_choice"
    title: ClassVar[str] = "Right one of several choices"
    auto_class: ClassVar[str] = "AutoModelForMultipleChoice"
    lora_type: ClassVar[Any] = None

    def columns(self, data: DataSection) -> list[str]:
        """Text, choices and the right one's number or text."""
        return [data.context_column, data.choices_column, data.label_column]

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `choices` (each with `input_ids` and perhaps `token_type_ids`) and `labels`, the right one's number."""
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            choices, label = _choices_of(row, data, number, len(rows[0][data.choices_column]))
            made = []
            for choice in choices:
                found = tokenizer(
                    str(row[data.context_column]), choice, truncation="longest_first", max_length=length, verbose=False
                )
                cut += bool(found.encodings[0].overflowing)
                names = ["input_ids", *(["token_type_ids"] if tells_texts_apart(config) else [])]
                made.append({name: found[name] for name in names if name in found})
            encoded.append({"choices": made, "labels": label})
        return encoded, cut

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function from encoded rows to a batch `[rows, choices, tokens]`."""
        return ChoiceCollator(tokenizer, bookkeeping)

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll (nats), rows and right ones; `logits` is `[rows, choices]`."""
        counted = batch["labels"] >= 0  # not so the rows that fill up a process's last batch
        logits, labels = logits[counted], batch["labels"][counted]
        right = (logits.argmax(-1) == labels).sum().double()
        return {"nll": summed_nll(logits, labels), "rows": right.new_tensor(len(labels)), "right": right}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a row) and `accuracy`."""
        return {"loss": float(sums["nll"] / sums["rows"]), "accuracy": float(sums["right"] / sums["rows"])}


@dataclass(frozen=True)
class ChoiceCollator:
    """Pads all choices of all rows to one length.

    Args:
        tokenizer: gives the pad token's id.
        bookkeeping: unused; an objective's collator has it.
    """

    tokenizer: Any
    bookkeeping: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch: integers `[rows, choices, tokens]`, `labels` `[rows]`."""
        pad_id(self.tokenizer, needed=True)
        flat = padded_inputs([choice for row in rows for choice in row["choices"]], self.tokenizer)
        batch = {name: value.unflatten(0, (len(rows), -1)) for name, value in flat.items()}
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def _choices_of(row: Row, data: DataSection, number: int, wanted: int) -> tuple[list[str], int]:
    """(choices, number of the right one) of a row.

    Raises:
        ValueError: no list, another number of choices than the first row has, or a label that is none of them.
    """
    choices, label = row[data.choices_column], row[data.label_column]
    if not is_list(choices) or len(choices) < 2:
        raise ValueError(f"row {number}: column {data.choices_column!r} must be a list of 2 choices or more")
    choices = [str(choice) for choice in choices]
    if len(choices) != wanted:
        raise ValueError(f"row {number}: {len(choices)} choices, but the first row has {wanted}")
    if isinstance(label, str) and label in choices:
        return choices, choices.index(label)
    if not str(label).isdigit() or int(label) >= len(choices):
        raise ValueError(f"row {number}: label {label!r} is neither a choice nor a number from 0 to {wanted - 1}")
    return choices, int(label)
