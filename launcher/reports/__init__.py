"""What a run says of itself afterwards: table, pictures, model card."""
