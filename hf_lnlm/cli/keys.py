"""`hf-lnlm config-keys`: every recipe key with type, default and meaning."""

from __future__ import annotations

from ..flows.console import print_json, table
from ..flows.keys import recipe_keys_starting


def config_keys(prefix: str, json: bool) -> int:
    """Print the keys that begin with a prefix. Returns the exit status."""
    found = recipe_keys_starting(prefix)
    if json:
        print_json([key._asdict() for key in found])
    else:
        table("Keys of a recipe (--set KEY=VALUE)", ["key", "type", "default", "meaning", "of"], found)
    return 0
