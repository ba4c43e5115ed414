"""Reduction in front of and inside a whole decoder: prefill against the ideal, decode steps, scores, text-only calls.

A Qwen2 of full depth and small width with random weights, whose visual tokens are named by their id. The attached
model and the plain one share their weights and take turns, and every ratio is the median of the pairs. The ideal
speed-up is that of the operations which the reduction removes, by the formula of ``vidtok.models.cost``; *by hand* is a
loop over the same layers that gathers the same tokens, without any hook.
"""
