"""The one training loop and what it stands on; knows tasks and methods only as contracts."""
