"""Whole passes: planned, through blocks that are called, of circuits and back; and the jobs of servers."""
