"""The demo model: its world, its training recipe, its judge."""
