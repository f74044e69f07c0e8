"""What runs inside a trace, here or on a server: plain functions of tensors. Imports nothing of headwise.

Next on the way of a sweep: `interventions.run.outcome` gathers the values, and `studies.measuring` labels them.
"""
