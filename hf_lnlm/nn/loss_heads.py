"""Losses of language-model and classification heads, right under gradient accumulation.

A head whose `forward` takes `num_items_in_batch` must divide its *summed* loss by it, or Trainer's gradients come out
scaled by the number of accumulation steps. Everything here does, for the losses that transformers scales and for those
that it does not (regression, multi-label, chunked and adaptive softmax).

References:
    [1] Grave et al. 2017, "Efficient softmax approximation for GPUs" (adaptive softmax).
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, pad
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..ops.linear_cross_entropy import linear_cross_entropy
from .effective_weight import effective_weight

Items = torch.Tensor | int | None
IGNORED = -100
"""Label of a position that is not predicted (PyTorch's `ignore_index`)."""


def next_token_labels(labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """Return the label of each position's *next* token, `(batch, length)`; the last position has none (-100).

    Args:
        labels: `(batch, length)`, aligned with the input as transformers wants it.
        shift_labels: `(batch, length)`, already shifted; taken as it is when given.
    """
    if shift_labels is not None:
        return shift_labels.contiguous()
    return pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def check_labels(labels: torch.Tensor, classes: int, shape: tuple[int, ...], name: str = "labels") -> None:
    """Refuse labels that are no classes: torch's own errors name neither the argument nor its range.

    Values are looked at on the CPU only: elsewhere that would wait for the device.

    Args:
        labels: class ids, or -100.
        classes: how many there are.
        shape: that the labels must have.
        name: the argument, for the message.

    Raises:
        ValueError: naming argument, range and value.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} must be whole numbers from 0 to {classes - 1}, got type {labels.dtype}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.device.type != "cpu" or is_torchdynamo_compiling():
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        raise ValueError(f"{name} must be between 0 and {classes - 1}, or {IGNORED} to be ignored, got {int(wrong[0])}")


def check_positions(positions: torch.Tensor, shape: tuple[int, int], name: str) -> torch.Tensor:
    """Return the columns of answers' ends, `(batch,)`; those to be ignored (-100, or beyond the text) become `length`.

    Args:
        positions: `(batch,)` or `(batch, 1)` columns.
        shape: batch and length of the text.
        name: the argument, for the message.

    Raises:
        ValueError: naming argument, shape or value.
    """
    columns = positions.squeeze(-1) if positions.dim() == 2 else positions
    check_labels(columns.clamp(max=shape[1] - 1), shape[1], shape[:1], name)
    return columns.masked_fill((columns < 0) | (columns > shape[1]), shape[1])


def normalised(total: torch.Tensor, count: torch.Tensor | int, num_items_in_batch: Items) -> torch.Tensor:
    """Divide a summed loss by the items of the whole batch, or by its own `count` when those are not given."""
    divisor = count if num_items_in_batch is None else num_items_in_batch
    return total / (divisor.to(total.device) if isinstance(divisor, torch.Tensor) else divisor)


class ClusteredSoftmax:
    """Adaptive softmax [1] as an LM head: called with hidden states it returns log-probabilities, which serve as logits.

    A mixin: the class beside it has the weights, and says what the scores of the head and of each tail are.
    """

    cutoffs: list[int]
    """Where the clusters end, ascending; the last one is the number of classes."""
    shortlist_size: int
    n_classes: int

    def head_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores `(tokens, shortlist_size + clusters)` of `(tokens, hidden_size)`."""
        raise NotImplementedError(f"{type(self).__name__} must score the shortlist and the clusters")

    def tail_scores(self, cluster: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores `(tokens, classes of the cluster)`; clusters count from 0."""
        raise NotImplementedError(f"{type(self).__name__} must score the classes of a cluster")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities `(..., vocab_size)` of hidden states `(..., hidden_size)`, in float32 at least.

        They are sums of two logarithms: rounded to bfloat16 they would be off by several percent of a probability.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        head = self._log_softmax(self.head_scores(flat))
        parts = [head[:, : self.shortlist_size]]
        for i in range(len(self.cutoffs) - 1):
            parts.append(self._log_softmax(self.tail_scores(i, flat)) + head[:, self.shortlist_size + i, None])
        return torch.cat(parts, 1).view(*hidden.shape[:-1], self.n_classes)

    def summed_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy of `(tokens, hidden_size)` against `(tokens,)`, negative labels ignored."""
        kept = labels >= 0
        hidden, labels = hidden[kept], labels[kept]
        edges = torch.tensor(self.cutoffs[:-1], device=labels.device)
        cluster = torch.bucketize(labels, edges, right=True)  # 0 is the shortlist
        column = torch.where(cluster == 0, labels, self.shortlist_size + cluster - 1)
        found = self._log_softmax(self.head_scores(hidden)).gather(1, column[:, None]).squeeze(1)
        for i in range(len(self.cutoffs) - 1):
            rows = (cluster == i + 1).nonzero().squeeze(1)
            if rows.numel():
                own = (labels[rows] - self.cutoffs[i])[:, None]
                scores = self.tail_scores(i, hidden[rows])
                found = found.index_add(0, rows, self._log_softmax(scores).gather(1, own).squeeze(1))
        return -found.sum()

    @staticmethod
    def _log_softmax(scores: torch.Tensor) -> torch.Tensor:
        """Logarithms of a softmax `(tokens, outputs)`, as everywhere of products in the model's own precision."""
        return torch.log_softmax(scores if scores.dtype == torch.float64 else scores.float(), 1)


class AdaptiveSoftmax(ClusteredSoftmax, nn.AdaptiveLogSoftmaxWithLoss):  # type: ignore[misc]  # another `forward`
    """Adaptive softmax with weights of its own: those of torch's module.

    Args:
        hidden_size: width of the hidden states.
        vocab_size: number of classes, the most frequent ones first.
        cutoffs: where the clusters begin, ascending, below `vocab_size`.
        div_value: factor by which each cluster's projection narrows.
    """

    def __init__(self, hidden_size: int, vocab_size: int, cutoffs: list[int], div_value: float = 4.0) -> None:
        super().__init__(hidden_size, vocab_size, cutoffs, div_value=div_value)

    def head_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores `(tokens, shortlist_size + clusters)` of `(tokens, hidden_size)`."""
        return self.head(hidden)

    def tail_scores(self, cluster: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores `(tokens, classes of the cluster)`; clusters count from 0."""
        return self.tail[cluster](hidden)


def chunked_loss(
    lm_head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, chunk_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the summed cross-entropy of an LM head without its logits.

    Args:
        lm_head: `nn.Linear`, or a wrapper of one (LoRA, quantised, offloaded).
        hidden: `(tokens, hidden_size)`.
        labels: `(tokens,)`, negative ones ignored.
        chunk_size: tokens a chunk.
        dtype: of the products.
    """
    weight, bias = effective_weight(lm_head, hidden.shape[-1], hidden.dtype, hidden.device)
    return linear_cross_entropy(hidden, weight, bias, labels, chunk_size, dtype)


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the precision of the products that a head called on `hidden` would have; float32 in place of float16.

    Kept gradients of float16 products would not have been scaled up against underflow.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return torch.float32 if dtype == torch.float16 else dtype


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, config: Any, num_items_in_batch: Items = None
) -> torch.Tensor:
    """Loss of a sequence classifier: single label, several labels or regression.

    The kind is `config.problem_type`; when that is None it follows, as in transformers, from `num_labels` and the
    labels' type, and is remembered in the config.

    Args:
        logits: `(batch, num_labels)`.
        labels: `(batch,)` ids, `(batch, num_labels)` zeros and ones, or `(batch[, num_labels])` values.
        config: with `num_labels` and `problem_type`.
        num_items_in_batch: number of labels of the whole accumulated batch.

    Raises:
        ValueError: the labels' shape, type or range does not fit the problem type.
    """
    if config.problem_type is None:
        config.problem_type = _problem_type(config.num_labels, labels)
    labels = labels.to(logits.device)
    if config.problem_type == "single_label_classification":
        check_labels(labels.view(-1), logits.shape[-1], logits.shape[:1])
        total = cross_entropy(logits.float(), labels.view(-1), ignore_index=IGNORED, reduction="sum")
        return normalised(total, (labels != IGNORED).sum(), num_items_in_batch)
    expected = logits.squeeze(-1).shape if config.num_labels == 1 else logits.shape
    if labels.squeeze(-1).shape != expected and labels.shape != expected:
        raise ValueError(f"{config.problem_type} labels must have shape {tuple(expected)}, got {tuple(labels.shape)}")
    _check_values(config.problem_type, labels)
    predicted, wanted = logits.float().reshape(-1), labels.reshape(-1).float()
    loss = mse_loss if config.problem_type == "regression" else binary_cross_entropy_with_logits
    return normalised(loss(predicted, wanted, reduction="sum"), wanted.numel(), num_items_in_batch)


def _check_values(problem_type: str, labels: torch.Tensor) -> None:
    """Refuse labels that are no numbers, or outside 0 to 1 where several labels may be right; on the CPU only."""
    if labels.device.type != "cpu" or is_torchdynamo_compiling() or not labels.numel():
        return
    low, high = (float(value) for value in labels.aminmax())
    lowest, highest = (0.0, 1.0) if problem_type == "multi_label_classification" else (-math.inf, math.inf)
    if not (lowest <= low and high <= highest and math.isfinite(high - low)):  # NaN is neither
        wanted = "between 0 and 1" if highest == 1.0 else "finite"
        raise ValueError(f"{problem_type} labels must be {wanted}, got values from {low} to {high}")


def _problem_type(num_labels: int, labels: torch.Tensor) -> str:
    if num_labels == 1:
        return "regression"
    integral = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if integral else "multi_label_classification"
