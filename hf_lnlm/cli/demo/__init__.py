"""`hf-lnlm demo`: memories learn to copy, families race on text, and both reload elsewhere."""
