"""Tokenizers, text sources, blocks and contiguous streams."""
