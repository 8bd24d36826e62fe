"""Where exported models run: a module an engine, each with `open_session(folder, threads)`."""
