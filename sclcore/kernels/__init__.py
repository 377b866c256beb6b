"""Fused steps: the same two passes as `sclcore.update`, for many pieces at once."""
