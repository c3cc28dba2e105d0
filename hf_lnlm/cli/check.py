"""`hf-lnlm check`: is a checkpoint folder whole, safe and ready for the Hub?"""

from __future__ import annotations

from dataclasses import asdict

from ..hub.check import Finding, check_folder, is_fit
from ..objectives import OBJECTIVES  # noqa: F401 (after this, models made of several are known to AutoConfig)
from .console import print_json
from .errors import FAILURE_STATUS


def check(folder: str, run_code: bool, json: bool) -> int:
    """Print one line for each finding. Returns 0 if the folder is fit, else 1."""
    findings = check_folder(folder, run_code)
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    return 0 if is_fit(findings) else FAILURE_STATUS


def print_findings(findings: list[Finding]) -> None:
    """One aligned line a finding."""
    for finding in findings:
        print(f"{finding.level:<4}  {finding.topic:<10}  {finding.message}")
