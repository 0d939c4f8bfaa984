"""Synthetic tasks, with the accuracy of guessing and the best possible one."""
