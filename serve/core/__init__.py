"""Configuration of the service, and what every part of it uses."""
