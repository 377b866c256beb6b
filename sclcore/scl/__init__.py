"""Sparse Connectivity Learning: the optimizer, its step, its state, and what steers λ."""
