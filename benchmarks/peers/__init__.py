"""Other engines, run beside skylapse on the same machine."""
