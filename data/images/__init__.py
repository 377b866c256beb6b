"""Image bytes ↔ pixels."""
