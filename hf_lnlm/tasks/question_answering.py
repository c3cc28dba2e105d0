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
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..data.cells import answers_cell, choices_cell, kind_of, text_cell
from ..data.labelled import Row
from ..data.section import DataSection
from ..objectives.base import Batch, pad_id
from .base import Task, padded_inputs, probabilities, summed_nll, tells_texts_apart

NOWHERE = 0
"""Where a window without the answer points: its first token, which is never one of the text's."""

MENDED = "answers mended"
"""Key of a row that was read: how many of its answers stand elsewhere than it says."""

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

    unanswered: ClassVar[Any] = ()

    stride: int = 32
    longest_answer: int = 30
    table: tuple[Row, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if self.stride < 0 or self.longest_answer < 1:
            raise ValueError(
                f"stride must be 0 or more and longest_answer 1 or more, got {self.stride} and {self.longest_answer}"
            )

    def cells(self, data: DataSection) -> dict[str, Callable[[Any], Any]]:
        """Question, text and answers."""
        return {
            data.question_column: text_cell,
            data.context_column: text_cell,
            data.answers_column: answers_cell,
        }

    def read(self, row: Row, data: DataSection) -> Row:
        """A row whose answers are pairs (start in the text, answer); counts those that stand elsewhere than it said.

        Raises:
            ValueError: a column is missing or holds something else, or an answer's place can't be told.
        """
        found = super().read(row, data)
        given = found[data.answers_column]
        starts = [place_answer(text, start, found[data.context_column]) for start, text in given]
        mended = sum(told is not None and told != start for (told, _), start in zip(given, starts))
        return found | {data.answers_column: [(start, text) for start, (_, text) in zip(starts, given)], MENDED: mended}

    def notes(self, rows: Sequence[Row], data: DataSection) -> list[str]:
        """How many answers stood elsewhere than their `answer_start` said."""
        mended = sum(row[MENDED] for row in rows)
        said = f"{mended} answers stand elsewhere than answer_start says and were mended: each stands once"
        return [said] if mended else []

    def label_column(self, data: DataSection) -> str:
        """The column of answers."""
        return data.answers_column

    def texts(self, rows: Sequence[Row], data: DataSection) -> Any:
        """Questions and texts; answers are parts of the texts."""
        return (row[column] for row in rows for column in (data.question_column, data.context_column))

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """One row a window: `input_ids`, `start_positions`, `end_positions`; counts answers that fit into no window."""
        encoded: list[Row] = []
        lost = 0
        for row in rows:
            windows = self._windows(row, data, tokenizer, config, length)
            found = row[data.answers_column]
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
        for number, row in enumerate(rows):
            windows = self._windows(row, data, tokenizer, config, length)
            found = row[data.answers_column]
            encoded.append(
                {
                    "number": number,
                    "windows": windows,
                    "places": _places(windows, found),
                    "context": row[data.context_column],
                    "answers": [answer for _, answer in found],
                }
            )
        return encoded, 0

    def _windows(self, row: Row, data: DataSection, tokenizer: Any, config: Any, length: int) -> list[Window]:
        question, context = row[data.question_column], row[data.context_column]
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
        """Start and end logits, `(windows, tokens, 2)`."""
        if outputs.get("start_logits") is None:
            return None
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Questions, exact matches and summed F1; `logits` is `(windows, tokens, 2)`."""
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

    def predictions(self, logits: Tensor, encoded: Sequence[Row]) -> list[dict[str, Any]]:
        """`answer`, its `start` in the text (characters), and `score`: how likely it is beside no answer at all.

        Args:
            logits: `(windows, tokens, 2)`.
            encoded: the batch's questions.
        """
        found, at = [], 0
        for row in encoded:
            mine = logits[at : at + len(row["windows"])].detach().float().cpu()
            at += len(row["windows"])
            best = best_stretch(mine, row, self.longest_answer)
            score = torch.tensor(best.score - best.nothing, dtype=torch.float64).sigmoid()
            found.append({"answer": best.text, "start": best.start, "score": round(float(score), 6)})
        return found

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`exact_match` and `f1`, shares of 1, over questions."""
        questions, exact, f1 = sums["answers"].tolist()
        return {"exact_match": exact / questions, "f1": f1 / questions}


@dataclass(frozen=True)
class WindowCollator:
    """Pads windows on the right; rows of questions are taken apart into their windows.

    Args:
        tokenizer: gives the pad token's id.
        bookkeeping: adds `example` `(windows,)`, the number of each window's question, and `row` `(windows,)`, the place of
            that question in the batch.
    """

    tokenizer: Any
    bookkeeping: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch: integers `(windows, tokens)`, `start_positions` and `end_positions` `(windows,)`."""
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


def place_answer(text: str, start: int | None, context: str) -> int:
    """Where an answer begins: where it is said to, else where it stands; the first place counts if nothing is said.

    Raises:
        ValueError: it is not in the text, or stands there several times but not where it is said to.
    """
    if start is not None and start >= 0 and context.startswith(text, start):
        return start
    found = context.find(text)
    if found < 0:
        raise ValueError(f"the answer {text!r} is not in the text")
    if start is not None and context.find(text, found + 1) >= 0:
        there = context[max(start, 0) : max(start, 0) + len(text)]
        raise ValueError(
            f"answer_start {start} is at {there!r}, but the answer {text!r} stands elsewhere, more than once"
        )
    return found


class Stretch(NamedTuple):
    """The best stretch of a text over all windows.

    Attributes:
        text: without white space around it.
        start: where it begins in the text, in characters.
        score: summed start and end logits.
        nothing: the same of no answer: the lowest over the windows.
    """

    text: str
    start: int
    score: float
    nothing: float


def best_answer(scores: Tensor, row: Row, longest: int, nulls: bool) -> str:
    """The best stretch of a text over all windows, or nothing where that scores higher.

    Args:
        scores: `(windows, tokens, 2)`, start and end logits.
        row: a question's `windows` and `context`.
        longest: most tokens of an answer.
        nulls: whether a question may have no answer.
    """
    best = best_stretch(scores, row, longest)
    return "" if nulls and best.nothing > best.score else best.text


def best_stretch(scores: Tensor, row: Row, longest: int) -> Stretch:
    """The best stretch of a text over all windows; see `best_answer`."""
    best, span = -torch.inf, (0, 0)
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
            span = (window.spans[first][0], window.spans[last][1])
    text = row["context"][slice(*span)]
    return Stretch(text.strip(), span[0] + len(text) - len(text.lstrip()), best, nothing)


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
    unanswered: ClassVar[Any] = 0

    def cells(self, data: DataSection) -> dict[str, Callable[[Any], Any]]:
        """Text, choices and the right one's number, name or text."""
        return {data.context_column: text_cell, data.choices_column: choices_cell, data.label_column: lambda cell: cell}

    def read(self, row: Row, data: DataSection) -> Row:
        """A row with the choices' texts and the right one's number, from 0.

        Raises:
            ValueError: a column is missing or holds something else, or the label is none of the choices.
        """
        found = super().read(row, data)
        texts, names = found[data.choices_column]
        number = _right_choice(found[data.label_column], texts, names)
        return found | {data.choices_column: texts, data.label_column: number}

    def read_inputs(self, row: Row, data: DataSection) -> Row:
        """A row with the choices' texts."""
        found = super().read_inputs(row, data)
        return found | {data.choices_column: found[data.choices_column][0]}

    def encode_inputs(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows as for training, with the `texts` of the choices."""
        encoded, cut = self.encode(rows, data, tokenizer, config, length)
        return [found | {"texts": row[data.choices_column]} for found, row in zip(encoded, rows)], cut

    def predictions(self, logits: Tensor, encoded: Sequence[Row]) -> list[dict[str, Any]]:
        """`choice` (its number from 0), its `text` and `scores` of all; `logits` is `(rows, choices)`."""
        best = logits.argmax(-1).tolist()
        return [
            {"choice": at, "text": row["texts"][at], "scores": shares}
            for at, shares, row in zip(best, probabilities(logits), encoded)
        ]

    def outliers(self, rows: Sequence[Row], data: DataSection) -> dict[int, str]:
        """Rows that have more or fewer choices than most: a batch has as many for every row."""
        sizes = [len(row[data.choices_column]) for row in rows]
        usual = Counter(sizes).most_common(1)[0][0] if sizes else 0
        return {at: f"{size} choices, but most rows have {usual}" for at, size in enumerate(sizes) if size != usual}

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `choices` (each with `input_ids` and perhaps `token_type_ids`) and `labels`, the right one's number."""
        encoded, cut = [], 0
        for row in rows:
            made = []
            for choice in row[data.choices_column]:
                options = {"truncation": "longest_first", "max_length": length, "verbose": False}
                found = tokenizer(row[data.context_column], choice, **options)
                cut += bool(found.encodings[0].overflowing)
                names = ["input_ids", *(["token_type_ids"] if tells_texts_apart(config) else [])]
                made.append({name: found[name] for name in names if name in found})
            encoded.append({"choices": made, "labels": row[data.label_column]})
        return encoded, cut

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function from encoded rows to a batch `(rows, choices, tokens)`."""
        return ChoiceCollator(tokenizer, bookkeeping)

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll (nats), rows and right ones; `logits` is `(rows, choices)`."""
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
        """A batch: integers `(rows, choices, tokens)`, `labels` `(rows,)`."""
        pad_id(self.tokenizer, needed=True)
        flat = padded_inputs([choice for row in rows for choice in row["choices"]], self.tokenizer)
        batch = {name: value.unflatten(0, (len(rows), -1)) for name, value in flat.items()}
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def _right_choice(label: Any, texts: list[str], names: list[str]) -> int:
    """The number of the choice that a label names: by its name, its text or its number from 0.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(label, (bool, float)):
        for choices in (names, texts):
            if str(label) in choices:
                return choices.index(str(label))
        if str(label).isdecimal() and int(label) < len(texts):
            return int(label)
    known = f"a choice's name ({', '.join(names)}), " if names else ""
    said = repr(label) if isinstance(label, str) else kind_of(label)
    raise ValueError(f"label {said} is neither {known}a choice nor a number from 0 to {len(texts) - 1}")
