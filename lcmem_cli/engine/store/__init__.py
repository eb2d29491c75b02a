"""Things kept on disk: latent shards, feature cache, indexes, and exact search over them."""
