"""Result files as a page with plots."""
