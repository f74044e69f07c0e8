"""Edges of circuits in a trace: plain functions of tensors, as in `interventions/traced`."""
