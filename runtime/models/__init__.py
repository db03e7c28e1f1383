"""Model families, their checkpoints and text encoders."""
