"""Part of the bigbatch namespace: import it as `bigbatch.ds_configs`."""

if "." not in __name__:
    raise ImportError("import bigbatch.ds_configs, not ds_configs: a second copy of every class would be made")
