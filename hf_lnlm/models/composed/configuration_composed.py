"""Configuration of models made of several."""

import copy
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..base import strict_config
from ..parts import NestedConfig, hidden_width

OF_A_FILE = ("_name_or_path", "auto_map", "architectures")


@strict_config
class ComposedConfig(NestedConfig):
    """Configuration of a model made of parts, each of which is trained with it and used by itself.

    Args:
        vocab_size: of all parts.
        hidden_size, num_hidden_layers: width and number of the hidden states that the model gives out.
        initializer_range: standard deviation of the initial weights of what belongs to no part.
        tie_word_embeddings: whether the parts share embeddings.

    Raises:
        ValueError: a field is out of range, a part is of an unknown family or made of parts itself, or the parts have
            different vocabularies.
    """

    model_type = "lnlm_composed"
    is_causal: ClassVar[bool] = False

    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, part in (kwargs.pop("parts", None) or {}).items():  # as checkpoints of 0.1 have them
            if name not in self.sub_configs:
                raise ValueError(f"{self.model_type} has the parts {', '.join(self.sub_configs)}, got {name!r}")
            setattr(self, name, part)
        super().__post_init__(**kwargs)

    def mirrored(self, name: str) -> Any:
        """Value of a field that is the main part's; the width is that of the hidden states given out."""
        return hidden_width(self.parts[self.main_part]) if name == "hidden_size" else super().mirrored(name)

    def check_bounds(self) -> None:
        """Check ranges, and that the parts fit each other."""
        super().check_bounds()
        sizes = {name: part.vocab_size for name, part in self.parts.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"{' and '.join(sizes)} need one vocabulary, got vocab_size {listed}")
        for name, part in self.parts.items():
            if isinstance(part, ComposedConfig):
                raise ValueError(f"{name} must be one model, got {part.model_type}, which is made of several")

    def part(self, name: str) -> Any:
        """A copy of a part's configuration.

        Raises:
            ValueError: there is no such part.
        """
        if name not in self.parts:
            raise ValueError(f"{self.model_type} has the parts {', '.join(self.parts)}, got {name!r}")
        return copy.deepcopy(self.parts[name])

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration itself: its vocabulary is that of all parts."""
        return self

    @property
    def max_position_embeddings(self) -> int | None:
        """Rows of the main part's position table, or None if it has none."""
        return getattr(self.parts.get(self.main_part), "max_position_embeddings", None)


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as plain values, without what belongs to a place on a disk."""
    return {name: value for name, value in config.to_dict().items() if name not in OF_A_FILE}
