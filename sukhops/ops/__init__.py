"""The public operators, one file each: checks, the fake, autograd, and the CUDA launchers' names."""
