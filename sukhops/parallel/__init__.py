"""Several processes: all communication of the package is in this folder.

Every rank holds one slice of the vocabulary (some rows of a head's weight), in the rank order of the group. A
rank computes its slice with the operators for one process. Ranks exchange a few numbers per token row, and
every rank combines them in rank order, so results are bitwise equal on all ranks.
"""
