"""measure, capture, compare_estimates: one request becomes one Dataset. Next: `interventions.plan`."""
