"""What `bigbatch quantize` consists of."""
