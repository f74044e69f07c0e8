"""What must be known of a Hugging Face model: families, their paths, the handle.

The folder `models/` beside the packages is another: it holds the weights of the shipped models.
"""
