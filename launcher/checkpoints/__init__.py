"""What a run saves and continues from: written, published, listed, pruned, read."""
