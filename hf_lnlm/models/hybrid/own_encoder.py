"""The encoder family of the package's own that a checkpoint carries beside this code.

Where hf_lnlm is installed its families are registered with the Auto classes and nothing is carried. In a checkpoint whose
encoder is one of them, this file is replaced by one that imports the carried classes (see hub/bundle.py).
"""

CARRIED: tuple[type, type] | None = None
