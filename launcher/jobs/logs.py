"""The lines that a training job writes, from CloudWatch Logs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dreambooth_sm.printing import printable

LOG_GROUP = "/aws/sagemaker/TrainingJobs"


class LogReader:
    """Reads a job's lines: each one once and in order, however CloudWatch cuts its pages.

    A job has one stream for each host and each start, ``NAME/algo-1-...``: a spot job that was interrupted continues in
    a new one.

    Args:
        client: boto3's CloudWatch Logs client.
        job: name of the training job; of an endpoint, that of its variant.
        group: that its streams are in.
    """

    def __init__(self, client: Any, job: str, group: str = LOG_GROUP) -> None:
        self._client, self._group = client, group
        self._prefix = f"{job}/"
        self._tokens: dict[str, str] = {}
        # What was read of a poll that an error ended; its tokens have moved on, so it must not be lost.
        self._unsaid: list[tuple[int, str]] = []

    def read(self) -> list[str]:
        """The lines that came since the last call; none while the job has not started.

        Raises:
            botocore.exceptions.ClientError: what is left after botocore's retries. The next call continues from here.
        """
        for stream in self._streams():
            for page in self._pages(stream):
                self._unsaid += [(event["timestamp"], printable(event["message"].rstrip("\r\n"))) for event in page]
        lines = [text for _, text in sorted(self._unsaid, key=lambda line: line[0])]
        self._unsaid = []
        return lines

    def _streams(self) -> list[str]:
        streams: list[str] = []
        try:
            pages = self._client.get_paginator("describe_log_streams").paginate(
                logGroupName=self._group, logStreamNamePrefix=self._prefix
            )
            for page in pages:
                streams += [stream["logStreamName"] for stream in page["logStreams"]]
        except self._client.exceptions.ResourceNotFoundException:
            pass  # no job of this account has written a line yet
        return streams

    def _pages(self, stream: str) -> Iterator[list[dict[str, Any]]]:
        """A page may be empty before the end; the end is where the token stays the same."""
        while True:
            token = self._tokens.get(stream)
            options = {"nextToken": token} if token else {}
            answer = self._client.get_log_events(
                logGroupName=self._group, logStreamName=stream, startFromHead=True, **options
            )
            self._tokens[stream] = answer["nextForwardToken"]
            yield answer["events"]
            if answer["nextForwardToken"] == token:
                return
