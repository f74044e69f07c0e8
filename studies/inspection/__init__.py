"""Look inside a model: what it says, and what its parts write, as labelled datasets.

`predict` gives the next tokens, with and without interventions; `attribution` what each part writes towards an answer;
`lens` what the stream of each layer, or each head, would say; `difference` a vector between two runs, to steer with;
`norms` how much each head moves between positions.
"""
