"""Where shards are and how their bytes come here: local, remote, cached, fetched ahead."""
