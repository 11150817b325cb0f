"""One module for each kind of source; `loaders.sources.registry` finds them here."""
