"""What each Triton kernel is compiled as ahead of time, one file per operation."""
