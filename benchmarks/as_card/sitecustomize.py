"""Makes a process believe that its card is the one that ``AS_CARD`` names; ``AS_CARD_GB`` leaves it less memory still.

Python imports this module at its start from wherever ``PYTHONPATH`` first finds it; see ``benchmarks.job_time``.
"""

import os

from dreambooth_sm.planning import cards

_card = cards.find_card(os.environ["AS_CARD"])


def _detect_card() -> cards.Card:
    from benchmarks.common import limit_memory

    limit_memory(_card, float(os.environ["AS_CARD_GB"]) if "AS_CARD_GB" in os.environ else None)
    return _card


cards.detect_card = _detect_card
