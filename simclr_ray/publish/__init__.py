"""What a run gives away: reports, lists of runs, and the block for bug reports."""
