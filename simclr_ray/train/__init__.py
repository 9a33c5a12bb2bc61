"""Training: derived numbers, checkpoints, the run folder, the worker loop and its driver."""
