"""Puts the method and the data together: recipes, ranks, DeepSpeed, checkpoints, `scl`."""
