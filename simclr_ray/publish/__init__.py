"""What goes out of a run: embeddings of whole data sets, exports for other libraries; and weights of others come in."""
