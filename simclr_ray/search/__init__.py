"""Which settings learn best: a search by Ray Tune, each trial of which is a training of its own."""
