"""Measurements of memories on models trained for the purpose, as tables, JSON and pictures."""
