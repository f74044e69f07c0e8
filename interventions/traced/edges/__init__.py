"""Circuits of edges: passes in which each receiver reads a stream of its own. Runs inside a trace."""
