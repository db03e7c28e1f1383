"""Figures over commits: comparing, gating, history."""
