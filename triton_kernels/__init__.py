"""CUDA kernels in Triton and their launchers, one file per operator; imported on the first CUDA call."""
