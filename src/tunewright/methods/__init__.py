"""Which numbers may move: one file each."""
