"""The service that a client's lines talk to is the one of tests/serve."""

from serve.conftest import demo_engine, service

__all__ = ["demo_engine", "service"]
