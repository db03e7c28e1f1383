"""Layers and packed tokens that model families share."""
