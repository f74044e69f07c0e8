"""Executes a plan on this machine: plan, traces, arrays. Next: `traced`."""
