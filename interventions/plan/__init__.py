"""Which conditions share a pass, what that costs, why a request is refused. No torch. Next: `run`."""
