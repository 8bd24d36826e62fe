"""The parts of `bigbatch serve`: what answers in batches, what speaks HTTP, and what guards it."""
