"""From shards to batches: who reads which sample when, workers, memory."""
