"""Sparse attention: index sets, their dense reference, and exact paths that cost `O(n · √n)`."""
