"""Ranks: where they are, how they start, meet, agree and end; what nodes are like."""
