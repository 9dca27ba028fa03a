"""A line of the log for each request, which CloudWatch makes metrics of (its embedded metric format)."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from dreambooth_sm.printing import safe

if TYPE_CHECKING:
    from dreambooth_sm.serving.engine import Engine
    from dreambooth_sm.serving.orders import Order

NAMESPACE = "dreambooth-sm"
_UNITS = {
    "Seconds": "Seconds",
    "QueueSeconds": "Seconds",
    "AdapterSeconds": "Seconds",
    "Pictures": "Count",
    "Batch": "Count",
    "Queue": "Count",
}


class RequestLine:
    """What the log says of one request.

    Args:
        identity: what the request is called.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self._began = time.monotonic()
        self._order: Order | None = None
        self._waiting, self._with_prompts = 0, False

    def tell(self, order: Order, engine: Engine) -> None:
        """Is told what the request was taken as."""
        self._order, self._waiting = order, engine.waiting
        self._with_prompts = engine.settings.log_prompts

    def write(self, status: int) -> None:
        """Prints the line."""
        now = time.monotonic()
        values: dict[str, object] = {"Seconds": round(now - self._began, 3)}
        told: dict[str, object] = {"request": safe(self.identity), "status": status}
        if order := self._order:
            request = order.request
            values |= {
                "QueueSeconds": round((order.begun or now) - order.taken, 3),
                "AdapterSeconds": round(order.reading, 3),
                "Queue": self._waiting,
                "Pictures": len(request.prompts),
                "Batch": order.batch,
            }
            told |= {"steps": request.steps, "width": request.size[0], "height": request.size[1]}
            if self._with_prompts:
                told["prompts"] = [safe(prompt) for prompt in request.prompts]
        metrics = [{"Name": name, "Unit": _UNITS[name]} for name in values]
        about = {"Namespace": NAMESPACE, "Dimensions": [[]], "Metrics": metrics}
        line = {"_aws": {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [about]}, **told, **values}
        print(json.dumps(line), flush=True)
