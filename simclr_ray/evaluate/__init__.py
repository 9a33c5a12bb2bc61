"""What a run learned: embeddings, probes, tables and pictures."""
