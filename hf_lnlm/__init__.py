"""hf_lnlm."""
