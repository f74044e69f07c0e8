"""Run a stored result again, compare, and write how it was made."""
