"""SageMaker's ``serve``: answers ``/ping`` and ``/invocations`` with the model that lies in ``/opt/ml/model``.

Exit codes: 0 ended on request; 2 bad input; 1 anything else.
"""

from __future__ import annotations

import os
import sys

import dreambooth_sm.quiet  # noqa: F401 - before the libraries that it quiets
from dreambooth_sm import __build__, sagemaker
from dreambooth_sm.errors import EXIT_BAD_INPUT, UserError
from dreambooth_sm.printing import safe, survive_streams
from dreambooth_sm.serving.heap import bound_arenas
from dreambooth_sm.serving.settings import ServingSettings

# Where SageMaker says another one than its usual.
_PORT, _USUAL_PORT = "SAGEMAKER_BIND_TO_PORT", "8080"


def main(arguments: list[str]) -> int:
    bound_arenas()
    try:
        if arguments:
            raise UserError(f"serve: {arguments[0]!r} is not an option; settings are variables of the environment")
        settings = ServingSettings.of(os.environ)
        port = os.environ.get(_PORT) or _USUAL_PORT
        if not port.isascii() or not port.isdecimal() or int(port) > 65535:
            raise UserError(f"{_PORT}: {port!r} is not a port")
        if __build__:
            print(f"image: {__build__}", flush=True)
        from dreambooth_sm.serving.server import serve  # imports what training has no need of

        return serve(sagemaker.base_directory() / "model", settings, port=int(port))
    except UserError as error:
        for problem in error.problems:
            print(f"error: {safe(problem)}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    survive_streams()
    sys.exit(main(sys.argv[1:]))
