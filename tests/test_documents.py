"""The documents stay true: the README's table is the registry's, the README is short, every recipe and family is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_lnlm.registry import FAMILIES, write_tables

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_at_most_220_lines():
    assert len(README.splitlines()) <= 220


def test_the_tables_are_the_registrys():
    assert not write_tables(ROOT / "README.md", check=True), "python -m hf_lnlm.registry --write"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_has_a_card(family):
    card = ROOT / "model_cards" / f"{family.name}.md"
    assert card.is_file(), f"{card.name} is missing"
    text = card.read_text(encoding="utf-8")
    assert family.model_type in text and "## Limits" in text


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_of_the_readme_lead_somewhere(target):
    assert target.startswith("http") or (ROOT / target).exists()


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"])
def test_documents_exist_and_say_something(name):
    assert len((ROOT / name).read_text(encoding="utf-8")) > 300
