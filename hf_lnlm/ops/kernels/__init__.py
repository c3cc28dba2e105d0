"""Compiled pieces that several operations share: explicit vectors, rows, products and controllers."""
