"""What happens to pixels before training, with randomness that belongs to the sample."""
