"""Pictures and clips that people give: read in one way for the command line, the Python API and the service."""
