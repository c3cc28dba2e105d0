"""Adaptive embeddings and a softmax that shares their weights: rare words get narrow vectors.

References:
    [1] Baevski and Auli 2019, "Adaptive Input Representations for Neural Language Modeling".
    [2] Grave et al. 2017, "Efficient softmax approximation for GPUs".
    [3] Dai et al. 2019, Transformer-XL, whose code ties each projection by its transpose.

Complexity: one product of each cluster's tokens with its own width; the softmax as in [2].
"""

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...nn.effective_weight import effective_weight
from ...nn.loss_heads import ClusteredSoftmax


class AdaptiveEmbedding(nn.Module):
    """Embeddings of a shortlist and of clusters, each of its own width, projected to one.

    Args:
        sizes: words of the shortlist and of each cluster, the most frequent ones first.
        widths: of their vectors.
        embedding_dim: width of what comes out.
    """

    def __init__(self, sizes: list[int], widths: list[int], embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = sum(sizes), embedding_dim
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.layers = nn.ModuleList([nn.Embedding(*shape) for shape in zip(sizes, widths, strict=True)])
        self.projections = nn.ModuleList([nn.Linear(width, embedding_dim, bias=False) for width in widths])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return `(..., embedding_dim)` of ids `(...)`.

        Raises:
            IndexError: an id is below 0 or no word's.
        """
        edges = torch.tensor(self.starts[1:], device=input_ids.device)
        cluster = torch.bucketize(input_ids.contiguous(), edges, right=True)
        if is_torchdynamo_compiling():
            return self._traced(input_ids, cluster)
        flat, of = input_ids.reshape(-1), cluster.reshape(-1)
        rows, parts = [], []
        for i, (layer, projection) in enumerate(zip(self.layers, self.projections, strict=True)):
            found = (of == i).nonzero().squeeze(1)
            if found.numel():
                rows.append(found)
                parts.append(projection(layer(flat[found] - self.starts[i])))
        return torch.cat(parts)[torch.cat(rows).argsort()].view(*input_ids.shape, self.embedding_dim)

    def _traced(self, input_ids: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """The same with shapes that do not depend on the ids: every cluster embeds every token."""
        out = self.projections[0](self.layers[0](torch.where(cluster == 0, input_ids, 0)))
        for i in range(1, len(self.starts)):
            own = cluster == i
            found = self.projections[i](self.layers[i](torch.where(own, input_ids - self.starts[i], 0)))
            out = torch.where(own.unsqueeze(-1), found, out)
        return out


class TransposedProjection(nn.Module):
    """A linear map to a cluster's width whose weight may be that of an embedding's projection.

    Args:
        in_features: width of the hidden states.
        out_features: width of the cluster.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return hidden @ self.weight


class ProjectedAdaptiveSoftmax(ClusteredSoftmax, nn.Module):
    """Adaptive softmax whose clusters can share weights with adaptive embeddings, or with one table of all words.

    Args:
        sizes: words of the shortlist and of each cluster.
        widths: of their vectors; one table of all words if they are alike and `shared`.
        hidden_size: width of the hidden states.
        shared: whether all clusters' words stand in one table.
    """

    def __init__(self, sizes: list[int], widths: list[int], hidden_size: int, shared: bool) -> None:
        super().__init__()
        self.sizes, self.widths, self.hidden_size = sizes, widths, hidden_size
        self.cutoffs = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.shortlist_size, self.n_classes = sizes[0], sum(sizes)
        shapes = [(widths[0], self.n_classes)] if shared else list(zip(widths, sizes, strict=True))
        self.layers = nn.ModuleList([nn.Linear(*shape) for shape in shapes])
        projected = not shared or widths[0] != hidden_size
        self.projections = nn.ModuleList([TransposedProjection(hidden_size, width) for width in widths if projected])
        self.clusters = nn.Linear(widths[0], len(sizes) - 1)

    def _words(self, part: int, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the words of a part, 0 for the shortlist, of what `_narrowed` gave."""
        if len(self.layers) == len(self.sizes):
            return self.layers[part](hidden)
        weight, bias = effective_weight(self.layers[0], self.widths[0], hidden.dtype, hidden.device)
        own = slice(self.cutoffs[part] - self.sizes[part], self.cutoffs[part])
        return linear(hidden, weight[own], None if bias is None else bias[own])

    def _narrowed(self, part: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.projections[part](hidden) if len(self.projections) else hidden

    def head_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores `(tokens, shortlist_size + clusters)` of `(tokens, hidden_size)`."""
        narrowed = self._narrowed(0, hidden)
        return torch.cat([self._words(0, narrowed), self.clusters(narrowed)], -1)

    def tail_scores(self, cluster: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores `(tokens, classes of the cluster)`; clusters count from 0."""
        return self._words(cluster + 1, self._narrowed(cluster + 1, hidden))
