"""Many fits at once: batches, recovery, power and the bootstrap."""
