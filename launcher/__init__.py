"""Part of the bigbatch namespace: import it as `bigbatch.launcher`."""

if "." not in __name__:
    raise ImportError("import bigbatch.launcher, not launcher: a second copy of every class would be made")
