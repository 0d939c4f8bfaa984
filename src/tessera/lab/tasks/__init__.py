"""Data that a task makes, with the accuracy of guessing and of knowing."""
