"""Which tensors of a model are connections, what one of them costs, and how many there are."""
