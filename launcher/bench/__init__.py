"""`scl bench`: how long a model takes on this machine, in the forms it can be run in."""
