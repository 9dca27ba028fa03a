"""How long tests wait for what has to come: on a machine that is loaded by ten others, only a fault takes longer."""

# Seconds.
PATIENCE = 1800.0
