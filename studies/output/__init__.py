"""How text, pages and progress look. Knows no result."""
