"""What a user writes: sites, interventions, grids, and their JSON. No torch, no model.

Next on the way of a sweep: `interventions.plan`, which turns edits into writes.
"""
