"""Numbers about predictions, per row, and the statistics of their differences."""
