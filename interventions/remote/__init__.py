"""Executes a plan on NDIF: the backend, jobs, their ledger, the protocol, the handle of a model."""
