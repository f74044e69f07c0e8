"""What runs inside a trace, here or on a server: plain functions of tensors. Imports nothing of headwise."""
