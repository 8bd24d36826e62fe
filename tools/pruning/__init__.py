"""Ways to take weights out of a model; `bigbatch prune` chooses among them."""
