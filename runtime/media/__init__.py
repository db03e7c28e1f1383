"""Read the pictures and clips that people give, in one way for the command line, the Python API and the service."""
