"""The questions: ablation, patching, composition, the induction study, and the sentences on what it found.

`findings` writes the sentences of the induction study, `conclusion` its answer in short. Every number comes from
`studies.measuring`.
"""
