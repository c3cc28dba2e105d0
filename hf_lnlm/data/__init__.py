"""Tokenizers, text sources, blocks and lanes."""
