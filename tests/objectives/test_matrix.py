"""Every objective with every family that it fits, in full and by adapters: a few steps, and the loss falls."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import set_seed

import hf_lnlm
from hf_lnlm.objectives import OBJECTIVES, objective, table
from hf_lnlm.objectives.families import STOCK
from hf_lnlm.registry import FAMILIES
from tests.objectives.families import CELLS, CONFIGS, DOCUMENTS, LENGTH, tokenizer_of

STEPS = 6
# One family of ours that reads either way, and the stock one that each objective was made for; the others are slow.
USUAL = {"lnlm_rnn", "lnlm_rnn, both ways", "gpt2", "bert", "albert", "electra", "xlnet", "t5"}


def losses_of(model: Any, batch: dict[str, torch.Tensor], rate: float, steps: int = STEPS) -> list[float]:
    """Train on one batch and return its losses."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    losses = []
    for _ in range(steps):
        outputs = model(**batch)
        outputs["loss"].backward()
        losses.append(float(outputs["loss"].detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def falls(goal: str, name: str, lora: bool = False) -> None:
    """Train on one batch and check that its loss falls, every parameter stays finite and figures can be had.

    With `lora` a model that has learnt from another batch goes on by adapters alone, and no other weight changes.
    """
    set_seed(0)
    learnt = objective(goal)
    tokenizer = tokenizer_of(name)
    learnt.check(CONFIGS[name], tokenizer)
    model = learnt.build(CONFIGS[name])
    rows = learnt.rows(DOCUMENTS, tokenizer, LENGTH)
    batch, other = (learnt.collator(tokenizer, seed=0)([rows[i] for i in part]) for part in (range(4), range(4, 8)))
    if lora:
        losses_of(model, other, 1e-2, 4 * STEPS)
        model = peft.get_peft_model(model, hf_lnlm.lora_config(model, r=4))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = losses_of(model, batch, 3e-2 if lora else 1e-2)
    assert losses[-1] < losses[0] * 0.99, losses
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())
    now = dict(model.named_parameters())
    assert bool(frozen) == lora and all(torch.equal(now[n], before) for n, before in frozen.items())
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
        metrics = learnt.summary(learnt.sums(learnt.logits(outputs), batch))
    assert all(value == value for value in metrics.values())


def _cells(usual: bool) -> list:
    return [pytest.param(*cell, id=" × ".join(cell)) for cell in CELLS if (cell[1] in USUAL) == usual]


@pytest.mark.parametrize(("goal", "name"), _cells(True))
def test_the_usual_families_learn(goal: str, name: str) -> None:
    falls(goal, name)


@pytest.mark.slow
@pytest.mark.parametrize(("goal", "name"), _cells(False))
def test_every_family_learns(goal: str, name: str) -> None:
    falls(goal, name)


@pytest.mark.parametrize(("goal", "name"), _cells(True))
def test_the_usual_families_learn_by_adapters(goal: str, name: str) -> None:
    falls(goal, name, lora=True)


@pytest.mark.slow
@pytest.mark.parametrize(("goal", "name"), _cells(False))
def test_every_family_learns_by_adapters(goal: str, name: str) -> None:
    falls(goal, name, lora=True)


def test_the_table_has_every_cell_and_no_other() -> None:
    lines = table().splitlines()
    header = [word.strip(" `") for word in lines[0].strip("|").split("|")]
    assert header[1:] == list(OBJECTIVES)
    marked, named = set(), []
    for line in lines[2:]:
        names, *cells = (word.strip() for word in line.strip("|").split("|"))
        named += [name.strip("`") for name in names.split(", ")]
        marked |= {
            (goal, name.strip("`")) for goal, cell in zip(header[1:], cells) for name in names.split(", ") if cell
        }
    assert sorted(named) == sorted([*(row.model_type for row in FAMILIES), *STOCK])
    assert marked == {(goal, name.partition(",")[0]) for goal, name in CELLS}


def test_every_objective_fits_something() -> None:
    assert {goal for goal, _ in CELLS} == set(OBJECTIVES)
