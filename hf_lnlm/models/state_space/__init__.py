"""Selective state space models."""
