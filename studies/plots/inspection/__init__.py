"""Pictures of what a model says, of what its parts write towards it, and of what is inside."""
