"""Bytes that models and requests need, predicted from shapes."""
