"""How connection tensors lie in memory and over ranks: features, units, blocks, pieces."""
