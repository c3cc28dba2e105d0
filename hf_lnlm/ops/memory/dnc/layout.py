"""What goes into and comes out of the Differentiable Neural Computer's operation: weights, state, options, order of the
interface vector.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods
    [2] Csordás, Schmidhuber 2019, Improving Differentiable Neural Computers Through Memory Masking, De-allocation, and
    Link Distribution Sharpness Control, arXiv 1904.10278
    [3] Franke, Niehues, Waibel 2018, Robust and Scalable Differentiable Neural Computer for Question Answering,
    arXiv 1807.02658

Interface vector, one linear map of the controller's h_t, clipped to ±`interface_clip`, for R read heads, K write heads and
word width W:
    read keys (R·W) · read strengths (R) · write keys (K·W) · write strengths (K) · erase vectors (K·W) · write vectors
    (K·W) · free gates (R) · allocation gates (K) · write gates (K) · read modes (R·(1+2K), only with temporal links) ·
    read masks (R·W) · write masks (K·W) (only with `masking`) · sharpness (R·2K, only with `sharpness`).
For one write head and no extras that is the vector of [1], `W·R + 3W + 5R + 3` numbers, in its order.
The modes of one read head are: backward along each write head's links, content, forward along each write head's links.
"""

from typing import NamedTuple

import torch

from ..driver import Loop
from ..layer import MemoryWeights, check_layer

SEEN = ("read_weightings", "write_weightings", "usage")  # parts of the state that make the addressing


class DNCOptions(NamedTuple):
    """Settings that change the equations."""

    num_read_heads: int = 1
    num_write_heads: int = 1
    controller: str = "lstm"
    temporal_links: bool = True
    masking: bool = False
    deallocation: bool = False
    sharpness: bool = False
    mask_min: float = 0.0
    interface_clip: float = 20.0


class DNCState(NamedTuple):
    """Everything that one step hands to the next, float32; K is 0 in `precedence` and `link` without temporal
    links."""

    hidden: torch.Tensor  # `(B, H)`
    cells: torch.Tensor  # `(B, H)`, `(B, 0)` for a feed-forward controller
    reads: torch.Tensor  # `(B, R·W)`
    memory: torch.Tensor  # `(B, N, W)`
    usage: torch.Tensor  # `(B, N)`, in [0, 1]
    precedence: torch.Tensor  # `(B, K, N)`, sums to at most 1
    link: torch.Tensor  # `(B, K, N, N)`: [i, j] is how far slot i was written right after slot j
    write_weightings: torch.Tensor  # `(B, K, N)`, each sums to at most 1
    read_weightings: torch.Tensor  # `(B, R, N)`, each sums to at most 1


class DNCAddressing(NamedTuple):
    """What every step addressed, without gradient."""

    read_weightings: torch.Tensor  # `(B, T, R, N)`
    write_weightings: torch.Tensor  # `(B, T, K, N)`
    usage: torch.Tensor  # `(B, T, N)`
    free_gates: torch.Tensor  # `(B, T, R)`
    allocation_gates: torch.Tensor  # `(B, T, K)`
    write_gates: torch.Tensor  # `(B, T, K)`
    read_modes: torch.Tensor  # `(B, T, R, 1+2K)`, or all ones `(B, T, R, 1)` without temporal links


class DNCOutputs(NamedTuple):
    """Results of the operation."""

    outputs: torch.Tensor  # `(B, T, H + R·W)`: [h_t ; r_t], zero at masked steps
    state: DNCState
    addressing: DNCAddressing


class Places(NamedTuple):
    """Where each part of the interface vector begins; `end` is its length."""

    read_keys: int
    read_strengths: int
    write_keys: int
    write_strengths: int
    erases: int
    adds: int
    free_gates: int
    allocation_gates: int
    write_gates: int
    modes: int
    read_masks: int
    write_masks: int
    sharpness: int
    end: int


def num_modes(options: DNCOptions) -> int:
    """Read modes of one read head: 1 + 2·K with temporal links, else 1.

    Args:
        options: settings.
    """
    return 1 + 2 * options.num_write_heads if options.temporal_links else 1


def places(options: DNCOptions, width: int) -> Places:
    """The layout of the interface vector.

    Args:
        options: settings.
        width: W, numbers in a memory slot.
    """
    reads, writes = options.num_read_heads, options.num_write_heads
    modes = reads * (1 + 2 * writes) if options.temporal_links else 0
    masks = width if options.masking else 0
    sharpness = 2 * reads * writes if options.sharpness else 0
    sizes = [
        reads * width, reads, writes * width, writes, writes * width, writes * width, reads, writes, writes, modes,
        reads * masks, writes * masks, sharpness,
    ]  # fmt: skip
    return Places(0, *[sum(sizes[: i + 1]) for i in range(len(sizes))])


def num_interface(options: DNCOptions, width: int) -> int:
    """Length of the interface vector.

    Args:
        options: settings.
        width: W, numbers in a memory slot.
    """
    return places(options, width).end


def check_arguments(
    inputs: torch.Tensor, weights: MemoryWeights, state: DNCState, options: DNCOptions, mask: torch.Tensor | None
) -> None:
    """Compare all shapes with each other.

    Args:
        inputs: `(B, T, D)`.
        weights: see `MemoryWeights`.
        state: see `DNCState`.
        options: see `DNCOptions`.
        mask: `(B, T)` or None.

    Raises:
        ValueError: a shape or option does not fit.
    """
    if options.sharpness and not options.temporal_links:
        raise ValueError("sharpness works on temporal links, got temporal_links=False")
    slots, width = state.memory.shape[1:]
    reads, writes = options.num_read_heads, options.num_write_heads
    linked = writes if options.temporal_links else 0
    shapes = {
        "memory": (slots, width),
        "usage": (slots,),
        "precedence": (linked, slots),
        "link": (linked, slots, slots),
        "write_weightings": (writes, slots),
        "read_weightings": (reads, slots),
    }
    check_layer(inputs, weights, state, options, mask, shapes, num_interface(options, width))


def gate_history(
    interface: torch.Tensor, options: DNCOptions, at: Places, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Free, allocation and write gates and read modes from raw interface vectors.

    Args:
        interface: `(..., num_interface)`.
        options: settings.
        at: what `places` says.
        mask: `(...)`; gates of masked steps are zero, since nothing happens there.

    Returns:
        `(..., R)`, `(..., K)`, `(..., K)` and `(..., R, modes)`.
    """
    bound = options.interface_clip
    gates = interface[..., at.free_gates : at.modes].clamp(-bound, bound).sigmoid()
    if mask is not None:
        gates = gates * mask[..., None]
    reads, writes = options.num_read_heads, options.num_write_heads
    free, allocation, write = gates.split([reads, writes, writes], -1)
    if not options.temporal_links:
        return free, allocation, write, torch.ones_like(free)[..., None]
    modes = interface[..., at.modes : at.read_masks].clamp(-bound, bound).unflatten(-1, (reads, -1))
    chosen = modes.softmax(-1)
    return free, allocation, write, chosen if mask is None else chosen * mask[..., None, None]


def named_outputs(
    outputs: torch.Tensor, state: DNCState, seen: list[torch.Tensor], options: DNCOptions, mask: torch.Tensor | None
) -> DNCOutputs:
    """The operation's named results.

    Args:
        outputs: `(B, T, H + R·W)`.
        state: after the last step.
        seen: the parts named in `SEEN` and the raw interface after every step, `(B, T, ...)` each.
        options: settings.
        mask: `(B, T)` bool or None.
    """
    *weightings, interface = seen
    gates = gate_history(interface, options, places(options, state.memory.shape[2]), mask)
    return DNCOutputs(outputs, state, DNCAddressing(*weightings, *gates))


class DNCLoop(Loop):
    """What the compiled loops of both devices share; see `Loop`."""

    followed, in_place = ("usage", "precedence", "write_weightings", "read_weightings"), ("memory", "link")
    seen = ("read", "write", "usage", "interface")

    def __init__(self, state: DNCState, options: DNCOptions, every: int) -> None:
        super().__init__(state, options, every)
        self.reads, self.writes, self.slots = options.num_read_heads, options.num_write_heads, state.memory.shape[1]
        self.linked, self.places = state.link.shape[1], places(options, self.width)

    def outputs(
        self, outputs: torch.Tensor, state: DNCState, seen: list[torch.Tensor], mask: torch.Tensor | None
    ) -> DNCOutputs:
        """The operation's named results; see `Loop`."""
        return named_outputs(outputs, state, seen, self.options, mask)
