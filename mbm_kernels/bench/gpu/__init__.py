"""Benchmarks and checks on a CUDA device, by processes that may fault."""
