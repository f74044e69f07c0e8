"""What is on disk and how it is trusted: files, provenance, unfinished results, the record of a result.

`registry` names what is stored by name: tasks, interventions, metrics.
"""
