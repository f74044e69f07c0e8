"""Runs a plan on NDIF: jobs and their queue, their ledger, the protocol, the handle of a model.

`run` makes jobs of a plan and halves those that run out of memory; `queue` sends them; `patience` decides when one is
lost and is sent again. The jobs run the functions of `interventions.traced`.
"""
