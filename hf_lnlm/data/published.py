"""Corpora as they are published: CoNLL, bAbI's own text, SQuAD, ARC and SNLI, recognised by what files and columns hold.

References:
    [1] Weston et al. 2015, Towards AI-Complete Question Answering, arXiv 1502.05698 (bAbI)
    [2] Rajpurkar et al. 2016, SQuAD, arXiv 1606.05250
    [3] Clark et al. 2018, ARC, arXiv 1803.05457
    [4] Bowman et al. 2015, SNLI, arXiv 1508.05326
    [5] Tjong Kim Sang, De Meulder 2003, CoNLL-2003 shared task, cs/0306050; universaldependencies.org for CoNLL-U
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .cells import Fault
from .section import DataSection

Rows = Iterator[tuple[int, dict[str, Any] | Fault]]
"""(line from 1, row) of a file."""

CONLL_U = ("id", "tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
CONLL_2003 = ("tokens", "pos_tags", "chunk_tags", "ner_tags")

COLUMNS: dict[str, tuple[dict[str, str], ...]] = {
    "sequence_classification": (
        {"text": "sentence1", "pair": "sentence2", "label": "gold_label"},
        {"text": "sentence1", "pair": "sentence2", "label": "label"},
        {"text": "premise", "pair": "hypothesis", "label": "label"},
        {"text": "question1", "pair": "question2", "label": "label"},
        {"text": "question", "pair": "sentence", "label": "label"},
        {"text": "sentence", "label": "label"},
        {"text": "context", "pair": "question", "label": "answer"},
    ),
    "regression": (
        {"text": "sentence1", "pair": "sentence2", "label": "score"},
        {"text": "sentence1", "pair": "sentence2", "label": "label"},
        {"text": "text", "label": "score"},
        {"text": "sentence", "label": "label"},
    ),
    "multi_label_classification": ({"text": "text", "label": "labels"},),
    "token_classification": (
        {"tokens": "tokens", "tags": "ner_tags"},
        {"tokens": "tokens", "tags": "upos"},
        {"tokens": "tokens", "tags": "pos_tags"},
        {"tokens": "words", "tags": "tags"},
    ),
    "multiple_choice": ({"context": "question", "choices": "choices", "label": "answerKey"},),
}
"""Task → columns of public corpora (SNLI, GLUE, bAbI, CoNLL, ARC …) by role; the first that fits counts."""

_BABI_LINE = re.compile(r"(\d+) (.*)")


def published_columns(task: str, columns: Iterable[str], data: DataSection, *, answered: bool = True) -> dict[str, str]:
    """Fields of `data` that name other columns, for rows of a public corpus; empty for other rows.

    Args:
        task: Its name.
        columns: Of the rows.
        data: What the recipe says; a column that it names is never replaced.
        answered: Whether rows hold labels; those whose labels are asked for need not.
    """
    there, usual = set(columns), DataSection()
    for roles in COLUMNS.get(task, ()):
        fields = {f"{role}_column": column for role, column in roles.items()}
        changed = {field: column for field, column in fields.items() if getattr(data, field) != column}
        wanted = {column for role, column in roles.items() if answered or role not in ("label", "tags")}
        if there >= wanted and all(getattr(data, f) == getattr(usual, f) for f in changed):
            return changed
    return {}


def format_of_text(lines: Sequence[str]) -> str:
    """What a text file with rows of labels is: `babi`, `snli`, `conll`, or `text` if it is none of them.

    Args:
        lines: The first of the file.
    """
    filled = [line for line in lines if line.strip()]
    if not filled:
        return "text"
    if all(_BABI_LINE.fullmatch(line) for line in filled) and any("?" in line and "\t" in line for line in filled):
        return "babi"
    if "gold_label" in filled[0].split("\t"):
        return "snli"
    words = [line.split() for line in filled if not line.startswith(("#", "-DOCSTART-"))]
    columns = {len(word) for word in words}
    parted = len(filled) < len(lines) or any(line.startswith("-DOCSTART-") for line in filled)
    return "conll" if parted and len(columns) == 1 and columns != {1} else "text"


def conll_rows(lines: Iterable[str]) -> Rows:
    """Sentences: `tokens`, the other columns by their usual names, and `tags`, the last column (CoNLL-U: `upos`).

    Columns are separated by tabs or spaces, sentences by blank lines. Lines of CoNLL-U that hold no word (comments,
    `1-2` of contractions, `8.1` of empty nodes) and `-DOCSTART-` are left out.
    """
    sentence: list[list[str]] = []
    begun, width, fault = 0, 0, ""
    for number, line in enumerate(itertools.chain(lines, [""]), start=1):
        cells = line.split("\t") if "\t" in line.strip() else line.split()
        if not line.strip() or cells[0] == "-DOCSTART-":
            if fault or sentence:
                yield begun, Fault(fault) if fault else _sentence(sentence, width)
            sentence, fault, begun = [], "", 0
        elif not (line.startswith("#") and not sentence and len(cells) != width and _is_comment(line)):
            width, begun = width or len(cells), begun or number
            if len(cells) != width or width < 2:
                fault = (
                    fault or f"a word and its tag wanted in {max(width, 2)} columns, got {len(cells)} in line {number}"
                )
            elif width != len(CONLL_U) or cells[0].isdigit():
                sentence.append(cells)


def _is_comment(line: str) -> bool:
    return re.match(r"#\s*\S+\s*=|#\s|#$", line) is not None


def _sentence(cells: list[list[str]], width: int) -> dict[str, Any]:
    usual = {len(CONLL_U): CONLL_U, len(CONLL_2003): CONLL_2003}
    names = usual.get(width, ("tokens", *(f"column_{number}" for number in range(2, width + 1))))
    columns = dict(zip(names, map(list, zip(*cells))))
    return columns | {"tags": columns["upos" if width == len(CONLL_U) else names[-1]]}


def babi_rows(lines: Iterable[str]) -> Rows:
    """Questions: `context` (the statements of the story so far), `question`, `answer`, `supporting` (statements from 0).

    A line is `3 Where is Mary? \\tbathroom\\t1`: its number in the story, and for a question the answer (several are
    joined by commas) and the numbers of the lines that tell.
    """
    statements: list[str] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        begin, *rest = line.split("\t")
        found = _BABI_LINE.fullmatch(begin)
        if found is None or len(rest) not in (0, 2):
            yield number, Fault("a numbered statement, or a question with answer and numbers between tabs, wanted")
            continue
        if found[1] == "1":
            statements, places = [], {}
        if not rest:
            places[found[1]] = len(statements)
            statements.append(found[2].strip())
            continue
        supporting = [places[place] for place in rest[1].split() if place in places]
        row = {"context": " ".join(statements), "question": found[2].strip(), "answer": rest[0].strip()}
        yield number, row | {"supporting": supporting}


def flat_rows(record: Mapping[str, Any]) -> Iterator[Any]:
    """The rows that a JSON object holds: those of SQuAD's articles, of a list under `data`, or itself (ARC made flat)."""
    inside = record.get("data")
    if isinstance(inside, list) and not any(isinstance(v, (list, Mapping)) for k, v in record.items() if k != "data"):
        for item in inside:
            yield from flat_rows(item) if isinstance(item, Mapping) else [Fault("must be an object with named columns")]
    elif isinstance(paragraphs := record.get("paragraphs"), list):
        for paragraph in paragraphs:
            yield from _questions(paragraph, record.get("title"))
    elif isinstance(asked := record.get("question"), Mapping) and "stem" in asked:
        yield {**record, "question": asked["stem"], "choices": asked.get("choices")}
    else:
        yield record


def _questions(paragraph: Any, title: Any) -> Iterator[Any]:
    """Rows `id`, `title`, `context`, `question`, `answers` of a paragraph of SQuAD."""
    questions = paragraph.get("qas") if isinstance(paragraph, Mapping) else None
    if not isinstance(questions, list):
        yield Fault("a paragraph with `context` and `qas` wanted, as in SQuAD")
        return
    for asked in questions:
        if isinstance(asked, Mapping):
            names = ("id", "question", "answers")
            yield {"title": title, "context": paragraph.get("context"), **{n: asked.get(n) for n in names}}
        else:
            yield Fault("a question of SQuAD must be an object")
