"""Accuracy of a small vision transformer against the tokens that are left: merging beside plainer ways."""
