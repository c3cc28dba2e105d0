"""`hf-lnlm push`: check a folder, write its card, send it to the Hub as one commit."""

from __future__ import annotations

import re
from pathlib import Path

from ..hub.card import RECIPE_FILE, write_card
from ..hub.check import check_folder, is_fit
from ..hub.push import is_published, published_files, push_folder
from .check import print_findings
from .errors import FAILURE_STATUS, UsageProblem
from .output import plain_when_piped
from .recipe import read_recipe


def push(
    folder: str,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    place = Path(folder)
    if not place.is_dir():
        raise UsageProblem(f"{folder} is not a folder")
    repo_id, license = _from_recipe(place, repo_id)
    if repo_id is None and not dry_run:
        raise UsageProblem("no repository: give owner/name after the folder, or hub.repo_id in its recipe")
    if (repo_id is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id)) or ".." in str(repo_id):
        raise UsageProblem(f"a repository is called owner/name, got {repo_id!r}")
    written = False if dry_run else write_card(place, repo_id, license)
    findings = check_folder(place, published=is_published)
    if dry_run and not (place / "README.md").is_file():
        findings = [finding for finding in findings if finding.topic != "card"]
    print_findings(findings)
    if not is_fit(findings) and not force:
        print("not pushed: mend what failed above, or push anyway with --force")
        return FAILURE_STATUS
    if dry_run:
        return _list_files(place, repo_id)
    plain_when_piped()
    if written:
        print("wrote README.md")
    address = push_folder(place, str(repo_id), private=private, revision=revision, message=message)
    print(f"pushed to {address}")
    return 0


def _from_recipe(folder: Path, repo_id: str | None) -> tuple[str | None, str | None]:
    """Repository and licence: the option first, then what the recipe beside the checkpoint says."""
    if not (folder / RECIPE_FILE).is_file():
        return repo_id, None
    hub = read_recipe(folder / RECIPE_FILE).hub
    return repo_id or hub.repo_id, hub.license


def _list_files(folder: Path, repo_id: str | None) -> int:
    """Print what a push would send; the card is written only by a real one."""
    files = published_files(folder)
    names = {entry.path: entry.size for entry in files}
    if "README.md" not in names:
        print("would write README.md")
    print(f"would push {len(names)} files, {sum(names.values()) / 1e6:.2f} MB, to {repo_id or 'a repository'}:")
    for name, size in names.items():
        print(f"{size:>12,}  {name}")
    return 0
