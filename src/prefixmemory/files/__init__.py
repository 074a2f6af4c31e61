"""Files that people write and programs read."""
