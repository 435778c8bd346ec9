"""Measured speed: against other programs, in one process and in turns, and against the machine's own limits. See `run.bench`."""
