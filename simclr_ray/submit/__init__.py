"""Verbs as jobs of a running cluster (Ray Jobs): what is sent, how it is followed, what its exit code means."""
