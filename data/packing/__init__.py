"""From a source to shards: encoding, writing, counting, and a picture of what came out."""
