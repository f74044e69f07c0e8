"""The script behind the shipped models."""
