"""What the engine and its parts cost, one file a suite."""
