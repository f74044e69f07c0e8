"""Tasks: recipes for prompts, and what counts as right."""
