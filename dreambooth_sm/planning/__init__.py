"""Which settings a card gets, and why. Imports no torch: a plan can be made and printed for a card that is not here."""
