"""Completions sampled in groups: each distinct prompt is prefilled once, and rows leave as they finish."""
