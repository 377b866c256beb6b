"""Datasets as WebDataset shards: packing, indexing, planning and reading; knows no model."""
