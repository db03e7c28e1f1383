"""A discrete-event model of the service."""
