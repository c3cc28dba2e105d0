"""Configuration of the Differentiable Neural Computer."""

from typing import ClassVar

from ...ops.backend import Operation
from ...ops.memory.dnc import DNC_MEMORY
from ..base import strict_config
from .memory_config import MAX_STATE, MemoryConfig


@strict_config
class DNCConfig(MemoryConfig):
    """Configuration of `DNCModel` and its heads; see `MemoryConfig` for the fields shared with other memories.

    Args:
        use_temporal_links: whether heads can follow the order of writes; costs memory_size² numbers a write head, at
            most 2**28 a row.
        use_masking: whether a lookup can ignore parts of a word (Csordás and Schmidhuber 2019).
        mask_min: smallest value of a mask.
        use_deallocation: whether freed slots are also erased (Csordás and Schmidhuber 2019).
        use_sharpness: whether forward and backward weightings are sharpened (Csordás and Schmidhuber 2019); runs on
            the eager backend.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_dnc"
    _operations: ClassVar[tuple[Operation, ...]] = (DNC_MEMORY,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {"mask_min": (0.0, 1.0), "memory_size": (1, 4096)}

    use_temporal_links: bool = True
    use_masking: bool = False
    mask_min: float | int = 0.0
    use_deallocation: bool = False
    use_sharpness: bool = False

    def unread(self) -> dict[str, str]:
        """What is for lookups by masked words; see `LNLMConfig.unread`."""
        return super().unread() | ({} if self.use_masking else {"mask_min": "use_masking=True"})

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        if self.use_sharpness and not self.use_temporal_links:
            raise ValueError("use_sharpness sharpens temporal links: use_temporal_links must be true, got false")
        largest = MAX_STATE // self.memory_size**2
        if self.use_temporal_links and self.num_write_heads > largest:
            raise ValueError(
                f"num_write_heads must be at most {largest} for temporal links between {self.memory_size} slots "
                f"(memory_size), got {self.num_write_heads}"
            )
