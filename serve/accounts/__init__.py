"""Tenants, keys, sessions and usage."""
