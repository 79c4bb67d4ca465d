"""Triton kernels for CUDA and their launchers, one file per operator; imported on the first CUDA call."""
