"""The picture that suits a variable of any dataset: stands above all pictures."""
