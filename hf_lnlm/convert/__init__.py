"""Checkpoints of other projects, to and from ours."""
