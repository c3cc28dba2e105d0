"""The how-tos of training/README.md do what they say, from top to bottom, in one folder."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from hf_lnlm.objectives import OBJECTIVES

from .cli.running import succeed

HOWTOS = (Path(__file__).resolve().parents[1] / "training" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", HOWTOS, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(900)
def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before, names = dict(OBJECTIVES), {"__name__": "howtos"}
    try:
        for language, text in BLOCKS:
            if language == "python":
                exec(compile(text, "training/README.md", "exec"), names)
            else:
                assert language == "bash"
                for line in text.splitlines():
                    assert line.startswith("hf-lnlm "), line
                    succeed(*shlex.split(line)[1:])
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(before)
        sys.modules.pop("mine", None)
    assert (tmp_path / "answers.csv").read_text().startswith("row,given_label,label,score,scores\n1,d,")
    assert (tmp_path / "curves.png").is_file() and not (tmp_path / "runs" / "other").exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", HOWTOS):
        assert (Path(__file__).resolve().parents[1] / "training" / target).exists(), target
