"""A convolution over time by four taps, four outputs at a time, in 9 products instead of 16 (minimal filtering).

Two outputs y0 = x0 w0 + x1 w1, y1 = x1 w0 + x2 w1 of a filter with two taps take three products [1], [2]:
(x0 - x1) w0, x1 (w0 + w1) and (x2 - x1) w1, whose neighbours add up to them. Four taps and four outputs are two by two of
that, one inside the other: nine products of matrices, between sums of weights and differences of frames. All factors are
1 or -1, so that little precision is lost: the result differs from the plain sum in rounding only.

The three maps are linear, so that a gradient takes the same nine products between transposes: the sums of products are the
transpose of the sums of weights, hence serve the gradient of the weights as they are, and the other way about.

    [1] Winograd 1980, "Arithmetic Complexity of Computations"; [2] Lavin & Gray 2016, "Fast Algorithms for Convolutional
    Neural Networks" (F(2, 2) is theirs with one tap less).

Glossary: C channels in, F features, T frames out; a tile is four neighbouring outputs, of which there are R = batch · T / 4
(the last one of a text is filled up with zeros). Of [2]: `differences` ↔ B^T d, `sums` ↔ G g, `gathered` ↔ A^T m.
Complexity: 9/16 of the multiplications of the plain sum; memory 9 · R · (F or C) while it runs.
"""

import torch
import torch.nn.functional as F

SIGNS = ((1, 1, -1), (1, 1, -1), (-1, -1, 1))
"""Sign of each difference of frames, which the product takes on."""

MIN_CHANNELS, MIN_FRAMES = 128, 600
"""Fewest channels, in and out, and fewest frames of a batch from which nine products take less time than the one of all
windows (tuning values): sums and differences take time in proportion to weights and frames, the products to both."""

Nine = list[list[torch.Tensor]]


def winograd_pays(frames: torch.Tensor, weight: torch.Tensor, kernel_size: int) -> bool:
    """Tell whether `WinogradConv` can convolve `(batch, T + k - 1, C)` frames by a `(F, k * C)` weight, and is faster."""
    batch, total, width = frames.shape
    enough = max(MIN_FRAMES, 2 * width)
    return kernel_size == 4 and min(width, weight.shape[0]) >= MIN_CHANNELS and batch * (total - 3) >= enough


def tile_count(length: int) -> int:
    """Number of tiles of four outputs in a row of `length`."""
    return -(-length // 4)


def differences(frames: torch.Tensor) -> Nine:
    """Return the nine differences of frames, each `(R, C)`, but for `SIGNS`.

    Args:
        frames: `(batch, T + 3, C)`.
    """
    batch, total, width = frames.shape
    tiles = tile_count(total - 3)
    frames = F.pad(frames, (0, 0, 0, 4 * tiles + 3 - total)).contiguous()
    steps = frames.stride()
    tiled = frames.as_strided((batch, tiles, 7, width), (steps[0], 4 * steps[1], steps[1], 1))
    far = (tiled[:, :, :5] - tiled[:, :, 2:]).flatten(0, 1)
    both = far[:, :4] - far[:, 1:]
    near = (tiled[:, :, 2:4] - tiled[:, :, 3:5]).flatten(0, 1)
    middle = tiled[:, :, 3].flatten(0, 1)
    return [
        [both[:, 0], far[:, 1], both[:, 1]],
        [near[:, 0], middle, near[:, 1]],
        [both[:, 2], far[:, 3], both[:, 3]],
    ]


def frames_gradient(nine: torch.Tensor, total: int) -> torch.Tensor:
    """Return the gradient of `(batch, total, C)` frames, given that of their differences: the transpose of `differences`.

    Args:
        nine: `(3, 3, batch, tiles, C)`, given up: it is calculated with in place.
        total: T + 3.
    """
    batch, tiles, width = nine.shape[2:]
    tiled = nine.new_empty(batch, tiles + 1, 4, width)
    tiled[:, -1] = 0.0
    own, late = tiled[:, :-1].unbind(2), tiled[:, 1:].unbind(2)  # a tile's first four frames, and its last three
    far = nine[0, 1].add_(nine[0, 2]).sub_(nine[0, 0]), nine[2, 0] - nine[0, 2], nine[2, 1].add_(nine[2, 2])
    far[2].sub_(nine[2, 0])
    own[0].copy_(nine[0, 0])
    own[1].copy_(far[0])
    torch.sub(far[1], nine[0, 0], out=own[2]).add_(nine[1, 0])
    torch.sub(far[2], far[0], out=own[3]).add_(nine[1, 1]).sub_(nine[1, 0]).add_(nine[1, 2])
    late[0].sub_(nine[2, 2]).sub_(far[1]).sub_(nine[1, 2])
    late[1].sub_(far[2])
    late[2].add_(nine[2, 2])
    return tiled.flatten(1, 2)[:, :total]


def sums(weights: torch.Tensor) -> Nine:
    """Return the nine sums of four neighbours, each `(rows, width)`.

    Args:
        weights: `(rows, 4, width)`: the taps of filters, or a gradient of the outputs of tiles.
    """
    inner, outer = weights[:, 0::2] + weights[:, 1::2], weights[:, :2] + weights[:, 2:]
    taps = weights.unbind(1)
    return [
        [taps[0], inner[:, 0], taps[1]],
        [outer[:, 0], inner[:, 0] + inner[:, 1], outer[:, 1]],
        [taps[2], inner[:, 1], taps[3]],
    ]


def gathered(nine: torch.Tensor) -> torch.Tensor:
    """Return four neighbours `(rows, 4, width)`: the transpose of `sums`.

    Args:
        nine: products `(3, 3, rows, width)`, given up: it is calculated with in place.
    """
    nine[:, 0].add_(nine[:, 1])
    nine[:, 2].add_(nine[:, 1])
    out = nine.new_empty(nine.shape[2], 4, nine.shape[3])
    for place, (outer, inner) in enumerate(((0, 0), (0, 2), (1, 0), (1, 2))):
        torch.add(nine[outer, inner], nine[outer + 1, inner], out=out[:, place])
    return out


def _products(left: Nine, right: Nine) -> torch.Tensor:
    """Nine matrix products with their signs, `(3, 3, rows, columns)`."""
    out = left[0][0].new_empty(3, 3, left[0][0].shape[0], right[0][0].shape[1])
    for i, signs in enumerate(SIGNS):
        for j, sign in enumerate(signs):
            torch.addmm(out[i, j], left[i][j], right[i][j], beta=0, alpha=sign, out=out[i, j])
    return out


def _turned(nine: Nine) -> Nine:
    return [[matrix.mT for matrix in row] for row in nine]


class WinogradConv:
    """What both passes of one convolution need: the differences of its frames and the sums of its weights.

    Args:
        frames: `(batch, T + 3, C)`.
        weight: `(F, 4 * C)`, a window frame by frame.
    """

    def __init__(self, frames: torch.Tensor, weight: torch.Tensor) -> None:
        self.batch, self.total, _ = frames.shape
        self.differences, self.sums = differences(frames), sums(weight.unflatten(1, (4, -1)))

    def output(self) -> torch.Tensor:
        """Return the convolution `(4 * R, F)`: rows of T frames, each filled up to whole tiles."""
        return gathered(_products(self.differences, _turned(self.sums))).flatten(0, 1)

    def gradients(self, gradient: torch.Tensor, wanted: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the gradients of frames (if wanted) and weight.

        Args:
            gradient: of `output`, zero where that is filled up.
            wanted: whether the first is.
        """
        nine = sums(gradient.unflatten(0, (-1, 4)))
        weight_gradient = gathered(_products(_turned(nine), self.differences)).flatten(1)
        if not wanted:
            return None, weight_gradient
        inner = _products(nine, self.sums).unflatten(2, (self.batch, -1))
        return frames_gradient(inner, self.total), weight_gradient
