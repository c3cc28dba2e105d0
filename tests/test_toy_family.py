"""Adding a family is four files: one is added to a copy of the tree, and passes what every family must pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lnlm.registry import write_tables

ROOT = Path(__file__).resolve().parent.parent

CONFIGURATION = '''"""Configuration of the leaky average."""

from typing import ClassVar

from ..base import LanguageModelConfig, strict_config


@strict_config
class ToyConfig(LanguageModelConfig):
    """Configuration of `ToyModel`.

    Args:
        leak: share of an average that each token replaces.
        classifier_dropout: dropout before the classifier.

    Raises:
        ValueError: a field is out of range.
    """

    model_type = "lnlm_toy"
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {"leak": (0.0, 1.0)}

    leak: float = 0.5
    classifier_dropout: float | int = 0.0
'''

MODELING = '''"""A leaky average of projected embeddings: the smallest family there could be.

References: none. Glossary: `leak` is the share that a token replaces. Deviations: none. Complexity: O(length).
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.inputs import CACHE_FIELD, prepare
from ...nn.masks import SegmentInfo, end_token
from ..base import LNLMPreTrainedModel
from ..heads import CausalLMHead, SequenceClassificationHead
from .configuration_toy import ToyConfig


class ToyLayer(GradientCheckpointingLayer):
    """One leaky average with a residual connection."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.leak = config.leak
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: torch.Tensor, average: torch.Tensor | None, segments: SegmentInfo
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `(batch, length, hidden_size)` from an average `(batch, hidden_size)` on."""
        average = torch.zeros_like(hidden[:, 0]) if average is None else average
        found = []
        for position, new in enumerate(self.projection(hidden).unbind(1)):
            if segments.starts is not None:
                average = average.masked_fill(segments.starts[:, position, None], 0.0)
            mixed = average + self.leak * (new.tanh() - average)
            real = None if segments.mask is None else segments.mask[:, position, None]
            average = mixed if real is None else torch.where(real, mixed, average)
            found.append(average)
        return hidden + torch.stack(found, 1), average


class ToyPreTrainedModel(LNLMPreTrainedModel):
    """What the family's models share."""

    config: ToyConfig
    _no_split_modules = ["ToyLayer"]
    _can_record_outputs = {"hidden_states": ToyLayer}
    _no_weight_decay = (r"\\.bias$",)
    _is_stateful = True


class ToyModel(ToyPreTrainedModel):
    """Embeddings and leaky averages, without a head."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the model on `(batch, length)` ids."""
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        hidden = batch.hidden
        for index, layer in enumerate(self.layers):
            states = batch.read(index, {"average": (self.config.hidden_size,)}) or {}
            hidden, average = layer(hidden, states.get("average"), batch.segments)
            batch.write(index, {"average": average})
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_FIELD: batch.cache if use_cache else None})


class ToyForCausalLM(CausalLMHead, ToyPreTrainedModel, GenerationMixin):
    """Language model of leaky averages."""

    body_class = ToyModel


class ToyForSequenceClassification(SequenceClassificationHead, ToyPreTrainedModel):
    """Classifier of texts by their last average."""

    body_class = ToyModel

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the last real token's vector."""
        return end_token(hidden, mask)


__all__ = ["ToyForCausalLM", "ToyForSequenceClassification", "ToyModel", "ToyPreTrainedModel"]
'''

ROW = """    Family(
        model_type="lnlm_toy",
        title="Leaky average",
        room="recurrent",
        name="toy",
        config="ToyConfig",
        models={
            "AutoModel": "ToyModel",
            "AutoModelForCausalLM": "ToyForCausalLM",
            "AutoModelForSequenceClassification": "ToyForSequenceClassification",
        },
        paper="Nobody 2026",
        sizes={"tiny": {"hidden_size": 64}, "small": {"hidden_size": 256}, "base": {"hidden_size": 768}},
        lora_targets=("projection",),
        demo={"Toy": {"learning_rate": 8e-3}},
    ),
"""

CARD = "# Leaky average (`lnlm_toy`)\n\n## What it is good for\nTests.\n\n## Limits\n- It learns next to nothing.\n"

COPIED = ("hf_lnlm", "tests", "training", "model_cards")
PYTEST = ("-m", "pytest", "-n", "0", "-o", "addopts=")
FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the repository with a family of four files more."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    room = tmp_path / "hf_lnlm" / "models" / "recurrent"
    (room / "configuration_toy.py").write_text(CONFIGURATION)
    (room / "modeling_toy.py").write_text(MODELING)
    (tmp_path / "model_cards" / "toy.md").write_text(CARD)
    table = tmp_path / "hf_lnlm" / "registry.py"
    before, opening, after = table.read_text().partition("FAMILIES: tuple[Family, ...] = (\n")
    table.write_text(before + opening + ROW + after)
    return tmp_path


def run(tree: Path, *arguments: str) -> str:
    places = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_family_is_four_files(tree: Path):
    with pytest.raises(AssertionError, match=r"README\.md's tables are due"):
        run(tree, "-m", "hf_lnlm.registry", "--check")
    run(tree, "-m", "hf_lnlm.registry", "--write")
    run(tree, "-m", "hf_lnlm.registry", "--check")
    assert (tree / "README.md").read_text().count("`lnlm_toy`") == 2
    assert "lnlm_toy" in run(tree, "-m", "hf_lnlm.cli.main", "list", "--json")
    core = run(tree, *PYTEST, "-m", "core", "-k", "toy", "tests/contract")
    assert int(re.findall(r"(\d+) passed", core)[0]) >= 12
    house = [f"tests/test_{name}.py" for name in ("style", "documents", "registry")]
    asked = "toy or carried_modules or lists_the_families or tables"
    run(tree, *PYTEST, "-k", asked, *house, "tests/objectives/test_matrix.py")


def test_the_tables_of_the_readme_are_written(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("| GPT-3 |", "| GPT-4 |", 1).replace("✓", "", 1), encoding="utf-8")
    assert write_tables(copy, check=True)
    assert write_tables(copy)
    assert copy.read_text(encoding="utf-8") == text
    assert not write_tables(copy)
    copy.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md.*<!-- families -->"):
        write_tables(copy)
