"""Plans: the settings that a card gets, and why. Imports no torch: the card of a plan need not be here."""
