"""Prompts, and what counts as right."""
