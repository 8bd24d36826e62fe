"""Part of the bigbatch namespace: import it as `bigbatch.recipes`."""

if "." not in __name__:
    raise ImportError("import bigbatch.recipes, not recipes: a second copy of every class would be made")
