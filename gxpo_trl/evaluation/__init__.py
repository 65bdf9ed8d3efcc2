"""Samples from models, judges the completions, and computes scores with intervals."""
