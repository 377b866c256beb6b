"""The update of one piece: the reference in PyTorch, and both its passes fused, in C and Triton."""
