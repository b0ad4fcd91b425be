"""What the operations over a linear head share; not an operation itself."""
