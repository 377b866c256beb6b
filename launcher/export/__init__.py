"""`scl export`: a run, a checkpoint or a model file → files for elsewhere, and what they are."""
