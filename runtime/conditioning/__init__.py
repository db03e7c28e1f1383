"""Given frames and source videos."""
