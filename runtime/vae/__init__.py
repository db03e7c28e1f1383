"""Streaming video VAEs."""
