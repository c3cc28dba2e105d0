"""The families of the package's own that a checkpoint carries for the models inside its model.

Where hf_lnlm is installed its families are registered with the Auto classes and nothing is carried. In a checkpoint with
models of such families inside, this file is replaced by one that imports the carried classes (see hub/bundle.py).
"""

from typing import Any

CARRIED: dict[str, tuple[Any, dict[str, Any]]] = {}
"""Model type → config class, and Auto class → model class."""
