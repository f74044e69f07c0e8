"""Leaves of `interventions`: counts of a model, hashes of data and functions, free memory."""
