"""Methods as a user writes them: outside the package, one file each, from the documents alone."""
