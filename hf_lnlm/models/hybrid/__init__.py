"""Hybrid families: a stock or own encoder with a convolutional head."""
