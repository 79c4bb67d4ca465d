"""The configurations of Triton kernels to compile ahead of time, one file per operation."""
