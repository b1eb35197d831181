"""Rows in: files and folders read, checked, split. Knows no model and imports no torch."""
