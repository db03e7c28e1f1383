"""The committed table of the published models that fit on each card: make it, check it, and compare two of them."""
