"""Look inside a model: what it says, and what its parts write, as labelled datasets.

`predict` gives the next tokens, with and without interventions; `attribution` what each part writes towards an answer;
`lens` what the stream of each layer would say.
"""
