"""`scl doctor --cluster`: what every node of a job has, and where they differ."""
