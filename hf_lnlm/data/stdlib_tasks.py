"""Labelled examples made of Python's own standard library, so that every fine-tuning recipe runs offline.

* classification: twenty lines of code → the package they come from;
* tagging: the words of a line of code → what Python's own `tokenize` says they are;
* summary: the source of a function → the first line of its docstring;
* question: what a function returns, answered by a stretch of a passage of code around it;
* choice: the source of a function → its docstring's first line among those of three others.

Rows carry the `path` of their file; splitting by it keeps a file's rows on one side.
"""

from __future__ import annotations

import ast
import io
import keyword
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

from .sources import PATH, stdlib_rows

CLASSES = 8
LINES = 20
MIN_CHARACTERS = 200
MAX_WORDS = 60
BEFORE, AFTER = 4, 12
LONGEST_ANSWER = 60
CHOICES = 4
_TAGS = {
    tokenize.OP: "operator",
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
}


def classification_rows() -> Iterator[dict[str, Any]]:
    """Rows `text`, `label`, `path`: passages of twenty lines from the eight packages with the most text."""
    sources = [row for row in stdlib_rows() if "/" in row[PATH]]
    sizes: Counter[str] = Counter()
    for row in sources:
        sizes[_package(row)] += len(row["text"])
    chosen = {name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:CLASSES]}
    for row in sources:
        if _package(row) in chosen:
            lines = row["text"].splitlines()
            for start in range(0, len(lines), LINES):
                text = "\n".join(lines[start : start + LINES])
                if len(text) >= MIN_CHARACTERS:
                    yield {"text": text, "label": _package(row), "path": row[PATH]}


def _package(row: dict[str, str]) -> str:
    return row[PATH].partition("/")[0]


def tagging_rows() -> Iterator[dict[str, Any]]:
    """Rows `tokens`, `tags`, `path`: one logical line of code each, of 3 to 60 words, no string over several lines."""
    for row in stdlib_rows():
        tokens: list[str] = []
        tags: list[str] = []
        for token in _python_tokens(row["text"]):
            if token.type == tokenize.NEWLINE:
                if 3 <= len(tokens) <= MAX_WORDS:
                    yield {"tokens": tokens, "tags": tags, "path": row[PATH]}
                tokens, tags = [], []
            elif token.string.strip() and "\n" not in token.string:
                tokens.append(token.string)
                tags.append(_tag(token))


def _python_tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    try:
        yield from tokenize.generate_tokens(io.StringIO(text).readline)
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return


def _tag(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    return _TAGS.get(token.type, "other")


def summary_rows() -> Iterator[dict[str, Any]]:
    """Rows `source`, `target`, `path`: a function without its docstring, and the docstring's first line."""
    for row in stdlib_rows():
        lines = row["text"].split("\n")
        for node in _functions(row["text"]):
            summary = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
            if len(summary) >= 10 and len(node.body) > 1:
                yield {"source": _without_docstring(lines, node), "target": summary, "path": row[PATH]}


def _without_docstring(lines: list[str], node: ast.FunctionDef) -> str:
    """A function's source, moved to the left margin, with the lines of its docstring left out.

    Args:
        lines: of the whole file.
        node: the function.
    """
    docstring = node.body[0]
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno or 0 : node.end_lineno]
    return textwrap.dedent("\n".join(kept))


def question_rows() -> Iterator[dict[str, Any]]:
    """Rows `question`, `context`, `answers`, `path`: what does a function return? The context goes on after it."""
    for row in stdlib_rows():
        lines = row["text"].split("\n")
        for node in _functions(row["text"]):
            last = node.body[-1]
            if not isinstance(last, ast.Return) or last.value is None or last.value.lineno != last.value.end_lineno:
                continue
            first = max(node.lineno - 1 - BEFORE, 0)
            before = "\n".join(lines[first : last.value.lineno - 1])
            line = lines[last.value.lineno - 1].encode()
            start = len(before) + 1 + len(line[: last.value.col_offset].decode())
            answer = line[last.value.col_offset : last.value.end_col_offset].decode()
            context = "\n".join(lines[first : (node.end_lineno or node.lineno) + AFTER])
            if len(answer) <= LONGEST_ANSWER and context[start : start + len(answer)] == answer:
                answers = {"text": [answer], "answer_start": [start]}
                yield {"question": f"{node.name} returns", "context": context, "answers": answers, "path": row[PATH]}


def _functions(text: str) -> Iterator[ast.FunctionDef]:
    """All functions of a module, in the order of the tree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def choice_rows() -> Iterator[dict[str, Any]]:
    """Rows `context`, `choices`, `label`, `path`: which of four docstring lines belongs to a function?"""
    rows = list(summary_rows())
    for number, row in enumerate(rows):
        others = [rows[(number + step * 13 + 1) % len(rows)]["target"] for step in range(CHOICES - 1)]
        if len({row["target"], *others}) == CHOICES:
            label = number % CHOICES
            choices = [*others[:label], row["target"], *others[label:]]
            yield {"context": row["source"], "choices": choices, "label": label, "path": row["path"]}


ROWS = {
    "sequence_classification": classification_rows,
    "token_classification": tagging_rows,
    "text_to_text": summary_rows,
    "question_answering": question_rows,
    "multiple_choice": choice_rows,
}
"""Name of a task → the function that makes its rows."""
