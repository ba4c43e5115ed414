"""Token merging inside whole vision towers against the plain tower, the published algorithm and the ideal.

CLIP towers with random weights. The plain tower and the attached ones share their weights and take turns with the
published algorithm on the same modules, and every ratio is the median of the pairs. The ideal speed-up is that of the
operations which merging removes. A block of T tokens of C channels that merges r of them, with an MLP of F, takes
8TC² + 4T²C in its attention half and 4(T−r)CF in its MLP half; the patch embedding stays as it is. *Cutting* leaves
the last r tokens out instead of merging them, at no cost: what this machine makes of fewer tokens.
"""
