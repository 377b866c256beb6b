"""What can be packed: the samples of a data set as their owners lay them out."""
