"""SageMaker's processing jobs around a training: ``check`` looks at its input, ``evaluate`` reads what it has measured.

Both see ``/opt/ml/processing`` as a training sees ``/opt/ml``: what is mounted for them lies there.

Exit codes as ``train.py`` has them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dreambooth_sm.data.concepts import find_subjects, read_concepts
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, UserError
from dreambooth_sm.evaluation import write_evaluation
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.decode import split_arguments
from dreambooth_sm.printing import safe, survive_streams, traceback_lines
from dreambooth_sm.sagemaker import Contract, base_directory, localize, write_failure

_USAGE = "process.py check [--name value ...]; process.py evaluate MEASURE ..."


def main(arguments: list[str]) -> int:
    base, (command, *words) = base_directory() / "processing", arguments or ["none"]
    try:
        if command == "check":
            check(base, words)
        elif command == "evaluate":
            print(write_evaluation(base, words), flush=True)
        else:
            raise UserError(f"{command}: unknown; {_USAGE}")
    except UserError as error:
        return fail(base, error.problems, EXIT_BAD_INPUT)
    except Exception as error:
        print(*traceback_lines(error), sep="\n", file=sys.stderr)
        return fail(base, [f"{type(error).__name__}: {error}"], EXIT_FAILURE)
    return EXIT_OK


def check(base: Path, words: list[str]) -> None:
    """Raises UserError unless a job can train on the pictures that are here."""
    contract = Contract(base)
    h = localize(Hyperparameters.parse(split_arguments(words)), contract)
    subjects = find_subjects(localize(read_concepts(h), contract), lambda line: print(f"warning: {line}", flush=True))
    for subject in subjects:
        print(f"{len(subject.pictures)} pictures: {safe(subject.prompt)}", flush=True)


def fail(base: Path, problems: tuple[str, ...] | list[str], code: int) -> int:
    """Says why, a line a problem, in the log and where SageMaker reads it."""
    for line in problems:
        print(f"error: {safe(line)}", file=sys.stderr, flush=True)
    write_failure(base.parent, "\n".join(problems), "message")
    return code


if __name__ == "__main__":
    survive_streams()
    sys.exit(main(sys.argv[1:]))
