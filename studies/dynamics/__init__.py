"""A study over the steps of training: inside a run of PyTorch Lightning, or over checkpoints that are there.

`callback` measures while a model is trained, `checkpoints` afterwards; both put their results into a `series`.
"""
