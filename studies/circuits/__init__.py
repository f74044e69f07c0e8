"""Circuits of edges: how much of a behaviour they keep, how sure they are, and files of others."""
