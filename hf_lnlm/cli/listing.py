"""`hf-lnlm list`: what there is, from the tables of families, objectives, tasks and methods."""

from __future__ import annotations

import re
from typing import Any

from ..flows.console import print_json, table
from ..flows.sizes import SIZES
from ..objectives.families import STOCK
from ..registry import FAMILIES, Family


def list_families(json: bool) -> int:
    """Print families, objectives, tasks and methods. Returns the exit status."""
    found: dict[str, Any] = {"families": [_family(row) for row in FAMILIES], "stock": STOCK}
    found |= {"objectives": _objectives(), "tasks": _tasks(), "methods": _methods()}
    if json:
        print_json(found)
        return 0
    rows = [[row["model_type"], row["title"], ", ".join(row["heads"]), row["paper"]] for row in found["families"]]
    table("Families of hf_lnlm", ["family", "what it is", "heads", "paper"], rows)
    stock = [[model_type, title] for model_type, title in STOCK.items()]
    table("Families of transformers (any other model type works too)", ["family", "what it is"], stock)
    table("Objectives", ["name", "what is learnt", "for", "paper"], [list(row.values()) for row in _objectives()])
    table("Tasks with labels", ["name", "what is learnt", "for"], [list(row.values()) for row in _tasks()])
    table("Learning from preferences", ["name", "what is learnt", "paper"], [list(m.values()) for m in _methods()])
    drawn = [[row["name"], row["title"]] for row in _algorithms()]
    table(
        "Algorithms that memories learn (hf-lnlm pretrain --objective …, no data needed)",
        ["name", "what is learnt"],
        drawn,
    )
    print(f"\nSizes: {', '.join(SIZES)}. Start: hf-lnlm pretrain --family {FAMILIES[0].model_type} --data stdlib")
    return 0


def list_synthetic(json: bool) -> int:
    """Print the synthetic tasks: what is learnt, by which models, and the sizes of training. Returns the exit status."""
    found = _algorithms() + _token_tasks()
    if json:
        print_json(found)
        return 0
    rows = [list(row.values()) for row in found]
    table("Synthetic tasks (hf-lnlm pretrain --data synthetic:NAME)", ["name", "what is learnt", "by", "sizes"], rows)
    return 0


def _heads(family: Family) -> list[str]:
    return [auto.removeprefix("AutoModelFor").replace("AutoModel", "Model") for auto in family.models]


def _family(row: Family) -> dict[str, Any]:
    return {
        "model_type": row.model_type,
        "title": row.title,
        "room": row.room,
        "heads": _heads(row),
        "paper": row.paper,
        "sizes": row.sizes,
        "lora_targets": [*row.lora_targets, *row.lora_parameters],
    }


def _objectives() -> list[dict[str, str]]:
    from ..objectives import OBJECTIVES

    return [
        {"name": name, "title": kind.title, "auto_class": kind.auto_class, "paper": kind.paper}
        for name, kind in OBJECTIVES.items()
    ]


def _tasks() -> list[dict[str, str]]:
    from ..tasks import TASKS

    return [{"name": name, "title": kind.title, "auto_class": kind.auto_class} for name, kind in TASKS.items()]


def _methods() -> list[dict[str, str]]:
    from ..trainer.alignment import METHODS

    return [{"name": name, "title": method.title, "paper": method.paper} for name, method in METHODS.items()]


def _algorithms() -> list[dict[str, str]]:
    from ..data.algorithmic import TASKS

    return [_synthetic(kind, "Turing machines, neural computers") for kind in TASKS.values()]


def _token_tasks() -> list[dict[str, str]]:
    from ..data.token_tasks import TOKEN_TASKS

    return [_synthetic(kind, "causal language models") for kind in TOKEN_TASKS.values()]


def _synthetic(kind: Any, learners: str) -> dict[str, str]:
    title = re.split(r",? (?:\[\d\], )?(?:section|table) | \[\d\]", str(kind.__doc__))[0]
    return {"name": kind.name, "title": title, "by": learners, "sizes": f"{kind.shortest} to {kind.longest}"}
