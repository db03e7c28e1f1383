"""What a lent GPU is asked in its half hour: one script a call, each ending in order, all of them resumable."""
