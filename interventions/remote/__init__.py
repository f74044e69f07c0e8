"""Executes a plan on NDIF: jobs, their ledger, the protocol, the remote model."""
