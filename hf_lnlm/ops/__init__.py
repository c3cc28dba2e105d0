"""Numerics: one folder an operation, each with a reference, an eager and, where it pays, compiled backends."""
