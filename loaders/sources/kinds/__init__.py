"""One module for each kind of source; `loaders.packing.find` finds them here."""
