"""Fixtures of the operations' tests."""

from __future__ import annotations

from .interpreter import interpreted

__all__ = ["interpreted"]
