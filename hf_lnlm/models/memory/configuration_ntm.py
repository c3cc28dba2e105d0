"""Configuration of the Neural Turing Machine."""

from typing import ClassVar

from ...ops.backend import Operation
from ...ops.memory.ntm import NTM_MEMORY
from ..base import check_choice, strict_config
from .memory_config import MemoryConfig

MEMORY_INITS = ("constant", "learned", "random")
INITIAL_WEIGHTINGS = ("random", "peaked", "uniform")
INITIAL_ADDRESSINGS = ("neutral", "tape")


@strict_config
class NTMConfig(MemoryConfig):
    """Configuration of `NTMModel` and its heads; see `MemoryConfig` for the fields shared with other memories.

    Args:
        shift_range: how far a head can move in one step, in slots, either way.
        read_before_write: whether heads read M_{t-1} (true) or M_t.
        memory_init: `constant` (`memory_init_value` everywhere), `learned` or `random` (fixed, drawn once).
        memory_init_value: see `memory_init`.
        initial_weighting: how the learned initial weightings begin: `random` logits, `peaked` on the first slot or
            `uniform`.
        initial_addressing: what untrained heads do: `neutral` (look up and shift either way alike) or `tape` (keep to
            where they are, sharply; writers walk on slot by slot, readers wait). With a peaked initial weighting the
            memory then begins as a tape, from which algorithmic tasks are learnt far more reliably.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_ntm"
    _operations: ClassVar[tuple[Operation, ...]] = (NTM_MEMORY,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "shift_range": (0, 1024),
        "memory_init_value": (-1e3, 1e3),
    }

    shift_range: int = 1
    read_before_write: bool = True
    memory_init: str = "constant"
    memory_init_value: float | int = 1e-6
    initial_weighting: str = "random"
    initial_addressing: str = "neutral"

    def unread(self) -> dict[str, str]:
        """What is for another beginning of the memory; see `LNLMConfig.unread`."""
        return super().unread() | (
            {} if self.memory_init == "constant" else {"memory_init_value": "memory_init='constant'"}
        )

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("memory_init", self.memory_init, MEMORY_INITS)
        check_choice("initial_weighting", self.initial_weighting, INITIAL_WEIGHTINGS)
        check_choice("initial_addressing", self.initial_addressing, INITIAL_ADDRESSINGS)
        if 2 * self.shift_range + 1 > self.memory_size:
            raise ValueError(
                f"shift_range must be at most {(self.memory_size - 1) // 2} for memory_size {self.memory_size} "
                f"(the kernel would wrap onto itself), got {self.shift_range}"
            )
