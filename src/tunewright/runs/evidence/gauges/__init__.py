"""One gauge of the evidence, one file: a function `measure(sides)`; see ../sides.py."""
