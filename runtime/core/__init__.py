"""Parts of the runtime that every other part may use."""
