"""What a folder of shards contains, and whether it is whole: manifest, index, doctor."""
