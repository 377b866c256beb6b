"""The folder of a run: who writes to it, what it was made of, what it says."""
