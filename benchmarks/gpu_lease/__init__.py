"""Measure on a GPU that is lent for half an hour: one script a call, each ending in order, all of them resumable."""
