"""Images: manifest, plan, shards, decoding, and the stream of units over Ray Data."""
