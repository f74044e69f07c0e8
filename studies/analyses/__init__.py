"""The questions: ablation, patching, composition, and the induction study."""
