"""Several processes: the only room that communicates.

Slices of a vocabulary: every rank holds some rows of a head's weight, slices follow each other in the
group's rank order. A rank computes its slice with the operators as they are. A few numbers per row
travel, and every rank combines them in rank order: results are the same on all ranks to the bit.
"""
