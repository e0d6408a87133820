"""A run: its configuration, its folder on disk, and what is shown of it."""
