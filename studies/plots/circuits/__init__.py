"""Pictures of circuits of edges."""
