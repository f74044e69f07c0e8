"""How the shipped model was trained. Knows no measurement."""
