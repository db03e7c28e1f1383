"""Which published models fit on which cards: the committed table, how it is made, and how two of them differ."""
