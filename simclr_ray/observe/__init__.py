"""Observing a run: metric names and sinks, label-free health measures, the console. Knows no Ray, ranks or models."""
