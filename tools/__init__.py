"""Part of the bigbatch namespace: import it as `bigbatch.tools`."""

if "." not in __name__:
    raise ImportError("import bigbatch.tools, not tools: a second copy of every class would be made")
