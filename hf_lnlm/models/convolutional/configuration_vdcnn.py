"""Configuration of the very deep convolutional network."""

from typing import Any, ClassVar

from ..base import LNLMConfig, check_bound, check_choice, strict_config

DEPTHS: dict[int, tuple[int, ...]] = {9: (2, 2, 2, 2), 17: (4, 4, 4, 4), 29: (10, 10, 4, 4), 49: (16, 16, 10, 6)}
POOLINGS = ("max", "kmax", "convolution")
NORMALIZATIONS = ("batch", "group")
Numbers = list[int] | tuple[int, ...]


@strict_config
class VDCNNConfig(LNLMConfig):
    """Configuration of `VDCNNModel` and `VDCNNForSequenceClassification` (Conneau et al. 2017).

    `VDCNNConfig.of_depth(9)` (17, 29, 49) makes the published networks.

    Args:
        hidden_size: width of the character embeddings.
        num_hidden_layers: convolutional blocks of two convolutions each; the published depth is twice that and 1 more.
        stage_blocks: blocks in each stage, whose sum is `num_hidden_layers`; None spreads them evenly over the stages.
        stage_channels: feature maps in each stage; between two stages the text is halved.
        kernel_size: frames a window sees; odd.
        pooling: how a text is halved: `max` (window 3, step 2), `kmax` (the greater half of each map's values) or
            `convolution` (the next stage's first one has step 2).
        shortcut: whether every block is bridged as in a residual network.
        normalization: `group` (each text by itself; exact under gradient accumulation and across devices) or `batch`,
            the paper's.
        num_groups: groups of channels of `group`.
        k_max: greatest values kept of each map after the last stage.
        intermediate_size: units of the two fully connected layers.
        dropout: dropout after each of them; the paper has none.
        max_position_embeddings: characters read; longer texts are cut.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_vdcnn"
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "stage_blocks": (0, 10_000),
        "stage_channels": (1, 2**20),
        "kernel_size": (1, 4095),
        "num_groups": (1, 2**20),
        "k_max": (1, 2**16),
        "max_position_embeddings": (1, 2**24),
    }

    vocab_size: int = 77
    hidden_size: int = 16
    num_hidden_layers: int = 4
    stage_blocks: Numbers | None = None
    stage_channels: Numbers = (64, 128, 256, 512)
    kernel_size: int = 3
    pooling: str = "max"
    shortcut: bool = False
    normalization: str = "group"
    num_groups: int = 8
    k_max: int = 8
    intermediate_size: int = 2048
    dropout: float | int = 0.0
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0

    @classmethod
    def of_depth(cls, depth: int, **fields: Any) -> "VDCNNConfig":
        """Return the published network with a number of convolutional layers, normalised over the batch as published.

        Args:
            depth: 9, 17, 29 or 49.
            fields: further fields of the config.

        Raises:
            ValueError: no such network was published.
        """
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        blocks = [convolutions // 2 for convolutions in DEPTHS[depth]]
        given = {"num_hidden_layers": sum(blocks), "stage_blocks": blocks, "normalization": "batch", **fields}
        return cls(**given)

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_bound("len(stage_channels)", len(self.stage_channels), (1, 16))
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, so that a block keeps the text's length, got {self.kernel_size}"
            )
        self._check_stages()
        uneven = [channels for channels in self.stage_channels if channels % self.num_groups]
        if self.normalization == "group" and uneven:
            raise ValueError(
                f"num_groups must divide stage_channels {list(self.stage_channels)}, got {self.num_groups}"
            )

    def _check_stages(self) -> None:
        blocks = self.stage_blocks
        if blocks is not None and (len(blocks) != len(self.stage_channels) or sum(blocks) != self.num_hidden_layers):
            raise ValueError(
                f"stage_blocks must name {len(self.stage_channels)} numbers of blocks that sum up to num_hidden_layers "
                f"({self.num_hidden_layers}), got {list(blocks)}"
            )

    def stages(self) -> list[int]:
        """Return the stage of each block, counted from 0, in ascending order."""
        count = len(self.stage_channels)
        if self.stage_blocks is not None:
            return [stage for stage, blocks in enumerate(self.stage_blocks) for _ in range(blocks)]
        return [block * count // self.num_hidden_layers for block in range(self.num_hidden_layers)]

    @property
    def reads_both_ways(self) -> bool:
        """Whether a position's output depends on what follows it."""
        return True
