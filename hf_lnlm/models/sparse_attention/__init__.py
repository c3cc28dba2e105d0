"""Linformer, Sparse Transformer and GPT-3's alternating dense and banded layers."""
