"""Parts of an engine replica."""
