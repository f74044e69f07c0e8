"""The same numbers again: rerun, compare, recipe."""
