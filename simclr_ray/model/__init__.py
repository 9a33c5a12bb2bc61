"""The networks: encoder, projector, and batch norm over the global batch."""
