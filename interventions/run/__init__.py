"""Runs a plan on this machine: passes to `PassSpec`, traces to arrays; halves what runs out of memory (`engine`).

Next on the way of a sweep: `interventions.traced`, what a trace runs.
"""
