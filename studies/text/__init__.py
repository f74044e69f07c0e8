"""Studies on text that a model has not read: how it is cut into windows, and induction on it.

Rooms above this one draw and report what they give.
"""
