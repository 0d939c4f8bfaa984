"""The commands `tessera train`, `tessera eval` and `tessera view`."""
