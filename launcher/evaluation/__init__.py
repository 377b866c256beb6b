"""`scl eval`: what a written model says of every sample, measured, shown and drawn."""
