"""A folder of results as a small database: what is in it, questions to it, and what a result says in short."""
