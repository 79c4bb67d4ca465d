"""The public operators, one file each: argument checks, fake implementations, autograd, CUDA launchers."""
