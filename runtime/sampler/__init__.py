"""Noise schedules, solvers and guidance."""
