"""measure, capture, compare_estimates: one request becomes one Dataset.

A sweep begins in `measure`, is checked in `request` and run in `sweep`. Next: `interventions.plan`.
"""
