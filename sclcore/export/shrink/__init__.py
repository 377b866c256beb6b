"""Making a trained network smaller: which features go, and what the others take over from them."""
