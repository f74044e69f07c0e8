"""Which conditions share a pass (`passes`), what that costs, why a request is refused. No torch.

Next on the way of a sweep: `interventions.run`, which runs the passes.
"""
