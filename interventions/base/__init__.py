"""Leaves: hashes of data and functions, counts of a model, which model a number belongs to."""
