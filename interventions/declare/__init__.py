"""What a user writes: sites, interventions, grids, and their JSON. No torch, no model. Next: `plan`."""
