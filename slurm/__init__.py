"""Part of the bigbatch namespace: import it as `bigbatch.slurm`."""

if "." not in __name__:
    raise ImportError("import bigbatch.slurm, not slurm: a second copy of every class would be made")
