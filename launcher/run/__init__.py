"""One run, on each of its ranks: what it is made from, the loop, and everything the loop calls."""
