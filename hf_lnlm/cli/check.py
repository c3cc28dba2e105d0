"""`hf-lnlm check`: is a checkpoint folder whole, safe and ready for the Hub?"""

from __future__ import annotations

import sys
from dataclasses import asdict

from ..errors import printable
from ..flows.console import print_json
from ..flows.push import print_findings
from ..hub.check import check_folder, is_fit
from ..hub.code import refresh
from ..objectives import OBJECTIVES  # noqa: F401 (after this, models made of several are known to AutoConfig)
from .errors import FAILURE_STATUS


def check(folder: str, run_code: bool, json: bool, refresh_code: bool) -> int:
    """Print one line for each finding, having renewed the carried code if asked. Returns 0 if fit, else 1."""
    if refresh_code:
        for line in refresh(folder):
            print(printable(line), file=sys.stderr)
    findings = check_folder(folder, run_code)
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    return 0 if is_fit(findings) else FAILURE_STATUS
