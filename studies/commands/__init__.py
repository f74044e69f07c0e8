"""The commands of the command line, one module each: ``add`` says how it is called, ``run`` does it.

Models, numbers and pictures are imported in ``run``, so that ``headwise --help`` and completion stay quick.
"""
