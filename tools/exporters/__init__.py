"""What writes a format: a module each, with `make(source, partial, options)`."""
