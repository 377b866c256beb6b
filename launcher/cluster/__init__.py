"""Ranks among each other: where they are, how they meet, agree and end. Knows no recipe."""
