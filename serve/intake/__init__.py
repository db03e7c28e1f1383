"""Request bodies and uploaded media, bounded and checked."""
