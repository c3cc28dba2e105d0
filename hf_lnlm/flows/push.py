"""`hf-lnlm push`: check a folder, write its card, send it to the Hub as one commit."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ..errors import UsageProblem, did_you_mean, printable
from ..hub.card import RECIPE_FILE, write_card
from ..hub.check import Finding, check_folder, is_fit
from ..hub.folder import shown, walk
from ..hub.push import check_secrets, foreign_files, is_published, published_files, push_folder
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
    include: list[str] | None = None,
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
    taken = _included(place, include or [])
    check_secrets(place, taken)
    written = False if dry_run else write_card(place, repo_id, license)
    findings = check_folder(place, published=lambda path: path in taken or is_published(path))
    if dry_run and not (place / "README.md").is_file():
        findings = [finding for finding in findings if finding.topic != "card"]
    print_findings(findings)
    if not is_fit(findings) and not force:
        print("not pushed: mend what failed above, or push anyway with --force")
        return 1
    if dry_run:
        return _list_files(place, repo_id, taken)
    plain_when_piped()
    if written:
        print("wrote README.md")
    _print_foreign(place, taken)
    address = push_folder(place, str(repo_id), private=private, revision=revision, message=message, include=taken)
    print(f"pushed to {address}")
    return 0


def _from_recipe(folder: Path, repo_id: str | None) -> tuple[str | None, str | None]:
    """Repository and licence: the option first, then what the recipe beside the checkpoint says."""
    if not (folder / RECIPE_FILE).is_file():
        return repo_id, None
    hub = read_recipe(folder / RECIPE_FILE).hub
    return repo_id or hub.repo_id, hub.license


def _included(folder: Path, names: list[str]) -> frozenset[str]:
    """The files that `--include` names.

    Raises:
        UsageProblem: one that isn't a file of the folder.
    """
    files = {entry.path for entry in walk(folder)[0]}
    for name in names:
        if name not in files:
            raise UsageProblem(f"--include {name!r} names no file of {folder}{did_you_mean(name, files)}")
    return frozenset(names)


def _print_foreign(folder: Path, taken: Collection[str]) -> None:
    for name in foreign_files(folder, taken):
        print(f"left out   {shown(name)} (no part of a checkpoint; --include {shown(name)} takes it)")


def _list_files(folder: Path, repo_id: str | None, taken: Collection[str]) -> int:
    """Print what a push would send; the card is written only by a real one."""
    files = published_files(folder, taken)
    _print_foreign(folder, taken)
    names = {entry.path: entry.size for entry in files}
    if "README.md" not in names:
        print("would write README.md")
    print(f"would push {len(names)} files, {sum(names.values()) / 1e6:.2f} MB, to {repo_id or 'a repository'}:")
    for name, size in names.items():
        print(f"{size:>12,}  {shown(name)}")
    return 0


def print_findings(findings: list[Finding]) -> None:
    """One aligned line a finding."""
    for finding in findings:
        print(f"{finding.level:<4}  {finding.topic:<10}  {printable(finding.message)}")
