"""Checkpoint folders and hubs: configs, files and weights."""
