"""One file reads one kind of source; the folder is the registry, the file name the recipe's `data.format`."""
