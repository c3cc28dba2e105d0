"""The examples in docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "convert.recurrent",
    "data.token_tasks",
    "flows.curves",
    "flows.keys",
    "data.tokenizers",
    "lora.plan",
    "objectives",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"hf_lnlm.{name}"))
    assert found.attempted
    assert not found.failed
