"""What goes out of a run: embeddings, exports, reports, lists of runs; and weights of others come in."""
