"""Measures of samples and paths."""
