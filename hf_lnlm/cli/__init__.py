"""The `hf-lnlm` command."""
