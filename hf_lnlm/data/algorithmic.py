"""The algorithmic tasks of the memory papers, as rows of continuous inputs and bits.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401, section 4 (tasks and their sizes)

A row has `inputs_embeds` `(length, input_size)` and `labels` `(length, output_size)`, both float32; labels are bits, and
-100 where nothing is asked. `Stream` gives endless rows to Trainer, `task_rows` a fixed `datasets.Dataset`, `pad_rows`
makes batches of either, `Curriculum` lengthens a stream's sequences as the model gets better.

Complexity: O(length · width) a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, ClassVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..nn.loss_heads import IGNORED

LARGEST = 2**20  # of sizes and widths: what is beyond was mistyped, and would be allocated
Row = dict[str, torch.Tensor]


def _bits(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Fair bits as float32."""
    return torch.randint(0, 2, shape, generator=generator).float()


def _between(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _blank(length: int, inputs: int, outputs: int) -> Row:
    """A row of silence: nothing given, nothing asked."""
    return {"inputs_embeds": torch.zeros(length, inputs), "labels": torch.full((length, outputs), float(IGNORED))}


def _check_whole(name: str, value: Any, low: int, high: int = LARGEST) -> None:
    """Refuse what is no whole number between both ends."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number between {low} and {high}, got {value!r}")


@dataclass(frozen=True)
class Task:
    """An algorithmic task.

    Attributes:
        shortest, longest: range of the task's size (its length, its number of items ...) in training.

    Raises:
        ValueError: a field is no whole number in its range; names field, range and value.
    """

    name: ClassVar[str]
    smallest: ClassVar[int] = 1  # size that makes sense
    shortest: int = 1
    longest: int = 20

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, getattr(self, field.name))
        if self.shortest > self.longest:
            raise ValueError(f"sizes must satisfy shortest <= longest, got {self.shortest} and {self.longest}")

    def _check(self, name: str, value: Any) -> None:
        """Refuse a field out of range."""
        _check_whole(name, value, self.smallest if name in ("shortest", "longest") else 1)

    @property
    def input_size(self) -> int:
        """Width of `inputs_embeds`."""
        raise NotImplementedError

    @property
    def output_size(self) -> int:
        """Width of `labels`."""
        raise NotImplementedError

    def row(self, generator: torch.Generator, size: int) -> Row:
        """Draw one row.

        Args:
            generator: source of randomness.
            size: the task's size; may lie beyond `longest`, to test generalisation.

        Raises:
            ValueError: the size is too small for the task, or no whole number.
        """
        _check_whole("size", size, self.smallest)
        return self._row(generator, size)

    def _row(self, generator: torch.Generator, size: int) -> Row:
        raise NotImplementedError

    def draw_size(self, generator: torch.Generator, longest: int | None = None) -> int:
        """Draw a size between `shortest` and `longest`.

        Args:
            generator: source of randomness.
            longest: another upper end.
        """
        return _between(generator, self.shortest, max(self.shortest, longest or self.longest))


@dataclass(frozen=True)
class BitTask(Task):
    """A task on vectors of bits; inputs are the bits and then the task's marks, outputs the bits and then its flags.

    Attributes:
        width: bits a step.
    """

    marks: ClassVar[int] = 1
    flags: ClassVar[int] = 0
    width: int = 8

    @property
    def input_size(self) -> int:
        """The bits and the marks."""
        return self.width + self.marks

    @property
    def output_size(self) -> int:
        """The bits and the flags."""
        return self.width + self.flags


@dataclass(frozen=True)
class Copy(BitTask):
    """Repeat a sequence of random bits after it has ended, section 4.1: size = its length. Marked is its end."""

    name: ClassVar[str] = "copy"

    def _row(self, generator: torch.Generator, size: int) -> Row:
        """`2·size + 1` steps."""
        row, sequence = _blank(2 * size + 1, self.input_size, self.output_size), _bits(generator, size, self.width)
        row["inputs_embeds"][:size, : self.width] = sequence
        row["inputs_embeds"][size, self.width] = 1.0
        row["labels"][size + 1 :] = sequence
        return row


@dataclass(frozen=True)
class RepeatCopy(BitTask):
    """Repeat a sequence a given number of times and flag the end, section 4.2: size bounds both length and repeats.

    Marked are the end of the sequence and the number of repeats (scaled by `longest`).
    """

    name: ClassVar[str] = "repeat_copy"
    marks: ClassVar[int] = 2
    flags: ClassVar[int] = 1
    longest: int = 10

    def _row(self, generator: torch.Generator, size: int) -> Row:
        """Length and repeats lie between `shortest` and `size`."""
        low = min(self.shortest, size)
        return self.exact_row(generator, _between(generator, low, size), _between(generator, low, size))

    def exact_row(self, generator: torch.Generator, length: int, repeats: int) -> Row:
        """Draw one row of a given length and number of repeats.

        Args:
            generator: source of randomness.
            length: steps of the sequence.
            repeats: how often it is asked for.

        Raises:
            ValueError: one of them is no whole number from 1 on.
        """
        _check_whole("length", length, 1)
        _check_whole("repeats", repeats, 1)
        row = _blank(length + 1 + length * repeats + 1, self.input_size, self.output_size)
        sequence = _bits(generator, length, self.width)
        row["inputs_embeds"][:length, : self.width] = sequence
        row["inputs_embeds"][length, self.width] = 1.0
        row["inputs_embeds"][length, self.width + 1] = repeats / self.longest
        row["labels"][length + 1 :] = 0.0
        row["labels"][length + 1 : -1, : self.width] = sequence.repeat(repeats, 1)
        row["labels"][-1, self.width] = 1.0
        return row


@dataclass(frozen=True)
class AssociativeRecall(BitTask):
    """Given a list of items and one of them, return the one after it, section 4.3: size = number of items.

    Marked are the beginning of an item, and both ends of the query.

    Attributes:
        item_length: steps of an item.
    """

    name: ClassVar[str] = "associative_recall"
    marks: ClassVar[int] = 2
    smallest: ClassVar[int] = 2
    shortest: int = 2
    longest: int = 6
    width: int = 6
    item_length: int = 3

    def _row(self, generator: torch.Generator, size: int) -> Row:
        """The query is never the last item."""
        items, step = _bits(generator, size, self.item_length, self.width), self.item_length + 1
        asked = _between(generator, 0, size - 2)
        row = _blank(step * size + self.item_length + 2 + self.item_length, self.input_size, self.output_size)
        inputs = row["inputs_embeds"]
        for i in range(size):
            inputs[step * i, self.width] = 1.0
            inputs[step * i + 1 : step * (i + 1), : self.width] = items[i]
        query = step * size
        inputs[[query, query + step], self.width + 1] = 1.0
        inputs[query + 1 : query + step, : self.width] = items[asked]
        row["labels"][query + step + 1 :] = items[asked + 1]
        return row


@dataclass(frozen=True)
class DynamicNGrams(Task):
    """Predict bits drawn from a new random n-gram table in every row, section 4.4: size = number of bits.

    Attributes:
        context: bits that decide the next one's probability, n − 1; at most 16, for the table has 2**context entries.
    """

    name: ClassVar[str] = "dynamic_ngrams"
    shortest: int = 200
    longest: int = 200
    context: int = 5

    @property
    def input_size(self) -> int:
        """The bit."""
        return 1

    @property
    def output_size(self) -> int:
        """The next bit."""
        return 1

    def _check(self, name: str, value: Any) -> None:
        if name == "context":
            _check_whole(name, value, 0, 16)
        else:
            super()._check(name, value)

    def _row(self, generator: torch.Generator, size: int) -> Row:
        """`size` steps; each table entry is from Beta(½, ½) [1]."""
        angles = torch.rand(2**self.context, generator=generator) * (torch.pi / 2)
        table = angles.sin().square()  # the square of the sine of a uniform angle has the law Beta(1/2, 1/2)
        draws = torch.rand(size + 1, generator=generator).tolist()
        bits, state = _bits(generator, self.context).int().tolist(), 0
        for bit in bits:
            state = 2 * state + bit
        for draw in draws[self.context :]:
            bit = int(draw < float(table[state]))
            bits.append(bit)
            state = (2 * state + bit) % 2**self.context
        stream = torch.tensor(bits[: size + 1], dtype=torch.float32)
        return {"inputs_embeds": stream[:-1, None].clone(), "labels": stream[1:, None].clone()}

    def optimal_probabilities(self, bits: torch.Tensor) -> torch.Tensor:
        """Return the Bayes-optimal probability that the next bit is one, `(N1 + ½) / (N0 + N1 + 1)` of its context.

        Args:
            bits: `(length,)` zeros and ones.

        Returns:
            `(length,)`: entry t from bits 0 to t; ½ while the context is incomplete.

        Raises:
            ValueError: something else than zeros and ones.
        """
        if bits.dim() != 1 or not ((bits == 0) | (bits == 1)).all():
            raise ValueError(f"bits must be zeros and ones, shape (length,), got {bits}")
        counts = torch.full((2**self.context, 2), 0.5, dtype=torch.float64)
        values, found, state = bits.int().tolist(), [], 0
        for t, bit in enumerate(values):
            if t >= self.context:
                counts[state, bit] += 1.0
            state = (2 * state + bit) % 2**self.context
            known = t + 1 >= self.context
            found.append(float(counts[state, 1] / counts[state].sum()) if known else 0.5)
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class PrioritySort(BitTask):
    """Return the vectors of highest priority, highest first, section 4.5: size = number of vectors.

    Marked are the priority of a vector, and the end.

    Attributes:
        kept: share of the vectors that is asked for, above 0 and up to 1: 16 of 20 in [1].
    """

    name: ClassVar[str] = "priority_sort"
    marks: ClassVar[int] = 2
    shortest: int = 20
    kept: float = 0.8

    def _check(self, name: str, value: Any) -> None:
        if name != "kept":
            super()._check(name, value)
        elif type(value) not in (int, float) or not 0 < value <= 1:
            raise ValueError(f"kept must be a number above 0 and up to 1, got {value!r}")

    def _row(self, generator: torch.Generator, size: int) -> Row:
        """Priorities are from U(−1, 1)."""
        vectors, asked = _bits(generator, size, self.width), max(1, round(self.kept * size))
        priority = torch.rand(size, generator=generator) * 2 - 1
        row = _blank(size + 1 + asked, self.input_size, self.output_size)
        row["inputs_embeds"][:size, : self.width] = vectors
        row["inputs_embeds"][:size, self.width] = priority
        row["inputs_embeds"][size, self.width + 1] = 1.0
        row["labels"][size + 1 :] = vectors[priority.argsort(descending=True)[:asked]]
        return row


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Copy, RepeatCopy, AssociativeRecall, DynamicNGrams, PrioritySort)
}


def algorithmic_task(name: str, **sizes: Any) -> Task:
    """Return a task by name, with the paper's sizes unless others are given.

    Args:
        name: one of `TASKS`.
        sizes: fields of the task.

    Raises:
        ValueError: there is no such task or field, or a size is out of range.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    try:
        return TASKS[name](**sizes)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from error


def task_rows(task: Task, rows: int, seed: int, size: int | None = None) -> Any:
    """Return a fixed set of rows as a `datasets.Dataset`.

    Args:
        task: which.
        rows: how many.
        seed: of the generator.
        size: the size of every row; drawn for each if None.

    Raises:
        ValueError: a number is out of range.
    """
    from datasets import Dataset

    _check_whole("rows", rows, 1, 2**40)
    generator = torch.Generator().manual_seed(seed)
    drawn = [task.row(generator, task.draw_size(generator) if size is None else size) for _ in range(rows)]
    columns = {name: [row[name].tolist() for row in drawn] for name in ("inputs_embeds", "labels")}
    return Dataset.from_dict(columns).with_format("torch")


class Stream(IterableDataset[Row]):
    """Endless rows of a task; rows of one batch have one size, so that nothing is padded.

    A batch depends on the seed, its number and `longest` at its time alone, so that skipping earlier batches (as a
    resumed run does) changes nothing. Workers of a DataLoader take turns; they do not see `longest` change.

    Args:
        task: which.
        batch_size: rows of one size in a row.
        seed: of the generator.
        longest: the largest size at first; may be changed at any time. `task.longest` if None.

    Raises:
        ValueError: `longest` is not a size of the task, or another number is out of range.
    """

    def __init__(self, task: Task, batch_size: int, seed: int, longest: int | None = None) -> None:
        _check_whole("batch_size", batch_size, 1)
        _check_whole("seed", seed, 0, 2**32 - 1)
        self.task, self.batch_size, self.seed = task, batch_size, seed
        self.longest = task.longest if longest is None else longest
        if not task.shortest <= self.longest <= task.longest:
            raise ValueError(f"longest must lie between {task.shortest} and {task.longest}, got {longest}")

    def __iter__(self) -> Iterator[Row]:
        generator = torch.Generator()
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in count(first, every):
            generator.manual_seed((self.seed << 32) + number)
            size = self.task.draw_size(generator, self.longest)
            for _ in range(self.batch_size):
                yield self.task.row(generator, size)


def pad_rows(rows: Sequence[Row]) -> Row:
    """Make a batch: inputs padded with zeros, labels with -100, and a mask only if anything is padded.

    Args:
        rows: as tasks draw them.
    """
    from torch.nn.utils.rnn import pad_sequence

    inputs = [torch.as_tensor(row["inputs_embeds"]) for row in rows]
    labels = [torch.as_tensor(row["labels"]) for row in rows]
    batch = {
        "inputs_embeds": pad_sequence(inputs, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    lengths = torch.tensor([len(x) for x in inputs])
    if int(lengths.min()) < int(lengths.max()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def wrong_bits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the wrong bits of each row, `(batch,)`.

    Args:
        logits, labels: `(batch, length, bits)`; -100 is not counted.
    """
    asked = labels != IGNORED
    return (((logits > 0) != (labels > 0.5)) & asked).flatten(1).sum(1)


class Curriculum:
    """Lengthens the sequences of a stream once the share of wrong bits is low.

    Args:
        stream: whose `longest` is raised, up to its task's.
        threshold: share of wrong bits, averaged over about 50 batches, below which it goes on.

    Raises:
        ValueError: the threshold is no share.
    """

    def __init__(self, stream: Stream, threshold: float = 0.1) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and up to 1, got {threshold}")
        self.stream, self.threshold = stream, threshold
        self.average: float | None = None

    @property
    def finished(self) -> bool:
        """Whether sequences have their full length."""
        return self.stream.longest >= self.stream.task.longest

    def observe(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take note of a batch.

        Args:
            logits: `(batch, length, bits)`, or `(batch, tokens, vocabulary)` of a task on tokens.
            labels: `(batch, length, bits)`, or `(batch, tokens)`.
        """
        from .token_tasks import wrong_tokens

        wrong = wrong_tokens if labels.dim() == 2 else wrong_bits
        share = float(wrong(logits, labels).sum() / (labels != IGNORED).sum().clamp(min=1))
        self.average = share if self.average is None else 0.98 * self.average + 0.02 * share
        if self.average < self.threshold and not self.finished:
            self.stream.longest = min(self.stream.task.longest, self.stream.longest + max(1, self.stream.longest // 2))
            self.average = 0.5  # unknown yet: what shorter sequences showed says little of longer ones
