"""Deployments under Ray Serve."""
