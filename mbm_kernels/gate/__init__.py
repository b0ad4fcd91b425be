"""What the compiler makes of each Triton kernel, held to what was recorded; no GPU is needed."""
