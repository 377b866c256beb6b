"""`scl shrink`: a trained network → a smaller one, its cut, and a recipe to fine-tune it."""
