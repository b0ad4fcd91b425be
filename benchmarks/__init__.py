"""Benchmarks of every operation against stock PyTorch; see README.md."""
