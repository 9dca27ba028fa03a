"""Types of values that several knobs share, with their limits."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Auto = Literal["auto"]
PositiveInt = Annotated[int, Ge(1)]
# Steps or epochs: more would take years.
MOST_STEPS = 10_000_000
Steps = Annotated[int, Ge(1), Le(MOST_STEPS)]
StepsOrNone = Annotated[int, Ge(0), Le(MOST_STEPS)]
# What random generators take.
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
# What is held in memory at a time, or drawn one by one.
Few = Annotated[int, Ge(1), Le(1_000)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
