"""Checks of a folder of pictures before a job starts: on the client or in the container. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

from PIL import Image, ImageFilter, ImageStat

from dreambooth_sm.data.buckets import enlargement, plan_buckets
from dreambooth_sm.data.captions import caption_files, fill, read_captions, read_dataset_info, words_of
from dreambooth_sm.data.folder import DATASET_INFO, scan, shortened
from dreambooth_sm.data.masks import Box, read_mask, subject_box
from dreambooth_sm.data.pictures import Shape, open_picture, problems_of, read_size
from dreambooth_sm.data.tokens import Vocabulary, find_vocabulary, too_long
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.pictures import FILEWORDS
from dreambooth_sm.knobs.textual_inversion import mentions, split_at

# Stand-ins for prompts, where nothing depends on what they say.
ANY_PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
FEWEST, MOST = 4, 100
# Times that a picture may be enlarged, a side; more is not a picture of the subject any more, but blocks.
MOST_ENLARGED = 4.0
# Bits of 512 in which the difference hashes of two pictures differ at most when they are called near duplicates. Copies
# that were scaled, brightened or saved again differ by 0 to 31; the closest two of different photos and drawings by 93.
NEAR = 50
# Variance of the Laplacian (8 bits a pixel) in the sharpest sixteenth of a picture. Real photos have 250 to 6,000;
# blurred by 2 pixels, none has more than 40.
BLURRED = 40.0
# No base model takes fewer tokens: the toybox's limit.
_FEWEST_TOKENS = 30
# Side at which sharpness is measured.
_SIDE = 512
_LAPLACIAN = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)


@dataclass(frozen=True)
class Picture:
    """One picture that can be used.

    Attributes:
        size: width and height, upright.
        shape: width and height that it is trained in.
        prompt: what it is shown with.
        digest: of the file.
        look: see :func:`difference_hash`.
        sharpness: see ``BLURRED``.
        subject: the box of its mask, which crops keep; None without a mask.
    """

    path: Path
    size: Shape
    shape: Shape
    prompt: str
    digest: str
    look: int
    sharpness: float
    subject: Box | None

    @property
    def enlarged(self) -> float:
        """How many times it is enlarged, a side; at most 1 where it is large enough."""
        return enlargement(self.size, self.shape)


@dataclass(frozen=True)
class Findings:
    """The pictures of a folder, and what is wrong with them.

    Attributes:
        errors: why a job can't use the folder; none where it can.
        warnings: what is worth knowing before the job starts.
        pictures: those that can be used.
    """

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class ClassFindings:
    """The class pictures of a folder; ``errors`` and ``warnings`` as in :class:`Findings`.

    Attributes:
        pictures: those that are used, at most as many as are wanted.
    """

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    pictures: tuple[Path, ...]


def for_folder(directory: Path, values: Mapping[str, object]) -> Hyperparameters:
    """Hyperparameters for :func:`check_folder` of a folder whose prompts may not be known yet.

    Args:
        values: as :meth:`Hyperparameters.parse` takes them; prompts may be left out.

    Raises:
        UserError: with everything that is wrong with them.
    """
    given = {**read_dataset_info(directory), **values}
    h = Hyperparameters.parse({**ANY_PROMPTS, **given})
    return h.model_copy(update={name: None for name in ANY_PROMPTS if given.get(name) is None})


def check_folder(
    directory: Path, h: Hyperparameters, *, name: str = "instance_data_dir", base: str | None = None
) -> Findings:
    """Reads every picture of the subject, its caption and its prompt, and says what is wrong and what is odd.

    Args:
        name: the hyperparameter that errors about the directory speak of.
        base: the base model, where it does not lie where the hyperparameters say.
    """
    folder = scan(directory)
    errors, warnings = list(folder.unreadable), folder.warnings()
    if not folder.pictures:
        found = [*errors, f"{name}: {_nothing_in(directory)}"]
        return Findings(tuple(map(printable, found)), tuple(map(printable, warnings)), ())
    uses_captions = FILEWORDS in (h.instance_prompt or "")
    captions: dict[Path, str] = {}
    try:
        captions = read_captions(directory, folder.pictures)
    except UserError as error:
        errors += error.problems if uses_captions else []
    try:
        warnings += _other_prompts(directory, h)
    except UserError as error:
        errors += error.problems
    pictures: list[Picture] = []
    unusable: list[str] = []
    for path in folder.pictures:
        try:
            pictures.append(_examine(path, h, captions.get(path), warnings.append))
        except UserError as error:
            unusable += error.problems
    if h.on_bad_image == "error" or not pictures:
        errors += unusable
    else:
        warnings += [f"left out: {line}" for line in unusable]
    errors += _too_long(pictures, h, base or h.pretrained_model_name_or_path)
    errors += _without_learned_word(pictures, h)
    pictures = _in_shapes(pictures, h)
    if h.instance_prompt and not uses_captions and (beside := captions or caption_files(folder.pictures)):
        warnings.append(
            f"{len(beside)} pictures have captions, which are not used: put {FILEWORDS} into instance_prompt where a "
            f'caption is to stand, such as "photo of zwx toy, {FILEWORDS}"'
        )
    without = sum(picture.subject is None for picture in pictures)
    if h.background_weight is not None and without:
        warnings.append(f"{without} of {len(pictures)} pictures have no mask: background_weight has no part in them")
    warnings += _odd(pictures, directory, h)
    return Findings(tuple(map(printable, errors)), tuple(map(printable, warnings)), tuple(pictures))


def check_class_folder(directory: Path, h: Hyperparameters, *, name: str = "class_data_dir") -> ClassFindings:
    """Reads the class pictures that a job will use: the first ``num_class_images`` that can be read.

    Args:
        name: the hyperparameter that errors about the directory speak of.
    """
    if directory.is_file():
        return ClassFindings((f"{name}: {directory} is a file; name a directory",), (), ())
    if not directory.is_dir():
        return ClassFindings((), (), ())
    folder = scan(directory)
    errors, warnings = list(folder.unreadable), folder.warnings()
    usable: list[Path] = []
    for path in folder.pictures:
        if len(usable) == h.num_class_images:
            warnings.append(
                f"of {len(folder.pictures)} class pictures in {directory} the first {h.num_class_images} by name are "
                f"used; set num_class_images={len(folder.pictures)} to use all of them"
            )
            break
        unreadable = problems_of(path, (h.resolution, h.resolution))
        if h.on_bad_image == "error":
            errors += unreadable
        else:
            warnings += [f"left out: {line}" for line in unreadable]
        if not unreadable:
            usable.append(path)
    return ClassFindings(tuple(map(printable, errors)), tuple(map(printable, warnings)), tuple(usable))


def printable(text: str) -> str:
    """Makes one harmless line, which any stream takes, of a text with file names in it: these may not be UTF-8, and may
    hold line ends and escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _nothing_in(directory: Path) -> str:
    if directory.is_file():
        return f"{directory} is a file; name the directory with the pictures of the subject"
    if directory.is_dir():
        others = sum(1 for path in directory.rglob("*") if not path.is_dir())
        return f"{directory} holds no pictures ({others} other files); put {FEWEST} to 20 JPEG or PNG pictures there"
    channel = directory.name
    if directory.parent.name == "data":
        return (
            f"{directory} does not exist; the job has no channel {channel!r}; pass it as an input, such as "
            f"inputs={{{channel!r}: 's3://...'}}"
        )
    return f"{directory} does not exist; name the directory with the pictures of the subject"


def _other_prompts(directory: Path, h: Hyperparameters) -> list[str]:
    given = {"instance_prompt": h.instance_prompt, "class_prompt": h.class_prompt}
    return [
        f"{directory / DATASET_INFO} says {name}={text!r}; the hyperparameters win: {name}={given[name]!r}"
        for name, text in read_dataset_info(directory).items()
        if given[name] not in (None, text)
    ]


def _too_long(pictures: Sequence[Picture], h: Hyperparameters, base: str) -> list[str]:
    """A line for each prompt that has more tokens than the job will encode."""
    if h.facts.longest_prompt:  # of another tokenizer
        return []
    prompts = {picture.prompt: f"{picture.path}: its prompt" for picture in reversed(pictures)}
    prompts |= {h.class_prompt: "class_prompt"} if h.class_prompt and h.instance_prompt else {}
    # A token has a byte at least: nobody's usual prompts need a vocabulary.
    if not h.placeholders and all(len(prompt.encode(errors="replace")) <= _FEWEST_TOKENS for prompt in prompts):
        return []
    if (vocabulary := find_vocabulary(base)) is None:
        return []
    counts = {prompt: _count(prompt, vocabulary, h) for prompt in prompts}
    return [
        too_long(f"{what} {prompt!r}", counts[prompt], h.max_token_length, vocabulary.limit(h.max_token_length))
        for prompt, what in prompts.items()
        if counts[prompt] > vocabulary.limit(h.max_token_length)
    ]


def _count(prompt: str, vocabulary: Vocabulary, h: Hyperparameters) -> int:
    """The tokens of a prompt; a word that is learned has as many as it has vectors."""
    pieces = split_at(prompt, list(h.placeholders))
    return sum(h.num_vectors if number % 2 else vocabulary.count(piece) for number, piece in enumerate(pieces))


def _without_learned_word(pictures: Sequence[Picture], h: Hyperparameters) -> list[str]:
    """A line for each picture that teaches none of the words that are to be learned."""
    words = list(h.placeholders)
    return [
        f"{picture.path}: its prompt {picture.prompt!r} does not have {' or '.join(words)}, which is to be learned; "
        "put it into instance_prompt or the caption"
        for picture in pictures
        if words and picture.prompt and not mentions(picture.prompt, words)
    ]


def _examine(path: Path, h: Hyperparameters, caption: str | None, warn: Callable[[str], None]) -> Picture:
    """Raises UserError where the picture can't be used."""
    picture = open_picture(path, (_SIDE // 2, _SIDE // 2), warn)
    size, square = read_size(path), (h.resolution, h.resolution)
    if enlargement(size, square) > MOST_ENLARGED:
        raise UserError(
            f"{path} has {size[0]} x {size[1]} pixels and would be enlarged {enlargement(size, square):.1f} times for "
            f"resolution={h.resolution}; use a larger picture or a smaller resolution"
        )
    prompt = fill(h.instance_prompt or "", words_of(path) if caption is None else caption)
    if h.instance_prompt and not prompt:
        lacking = "no caption and no words in its name" if caption is None else "an empty caption"
        raise UserError(f"{path} has {lacking}, which leaves nothing for {FILEWORDS}; add one")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    mask = read_mask(path)
    subject = subject_box(mask) if mask else None
    return Picture(path, size, square, prompt, digest, difference_hash(picture), sharpness(picture), subject)


def _in_shapes(pictures: list[Picture], h: Hyperparameters) -> list[Picture]:
    shapes = picture_shapes([picture.size for picture in pictures], h)
    return [Picture(**{**vars(picture), "shape": shape}) for picture, shape in zip(pictures, shapes, strict=True)]


def picture_shapes(sizes: Sequence[Shape], h: Hyperparameters) -> list[Shape]:
    """The shape that each instance picture of a job is trained in."""
    if h.buckets:
        return plan_buckets(sizes, h.resolution, h.bucket_step)
    return [(h.resolution, h.resolution)] * len(sizes)


def difference_hash(picture: Image.Image) -> int:
    """dHash (Krawetz 2013, "Kind of Like That") in both directions: 512 bits that mostly stay when a picture is scaled
    or saved again. Each of 16 x 16 places is brighter than the next one to the right or not, and than that below."""
    grey = picture.convert("L")
    wide, high = (grey.resize(size, Image.Resampling.LANCZOS).tobytes() for size in ((17, 16), (16, 17)))
    bits = [left > right for start in range(0, 272, 17) for left, right in pairwise(wide[start : start + 17])]
    bits += [above > below for above, below in zip(high, high[16:], strict=False)]
    return sum(bit << place for place, bit in enumerate(bits))


def sharpness(picture: Image.Image) -> float:
    """Variance of the Laplacian in the sharpest of 4 x 4 tiles: a sharp subject before a soft background is sharp."""
    grey = picture.convert("L")
    grey.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    edges = grey.filter(_LAPLACIAN)
    width, height = edges.size[0] - 2, edges.size[1] - 2  # without the border, which the filter leaves as it is
    tiles = [
        (1 + width * column // 4, 1 + height * row // 4, 1 + width * (column + 1) // 4, 1 + height * (row + 1) // 4)
        for row in range(4)
        for column in range(4)
    ]
    whole = [tile for tile in tiles if tile[0] < tile[2] and tile[1] < tile[3]]
    return max((ImageStat.Stat(edges.crop(tile)).var[0] for tile in whole), default=0.0)


def _odd(pictures: list[Picture], directory: Path, h: Hyperparameters) -> list[str]:
    """Finds what does not stop a job and may spoil its result."""

    def name(picture: Picture) -> str:
        return picture.path.relative_to(directory).as_posix()

    found: list[str] = []
    if 0 < len(pictures) < FEWEST:
        found.append(f"{len(pictures)} pictures in {directory} are few; {FEWEST} to 20 show a subject better")
    if len(pictures) > MOST:
        found.append(
            f"{len(pictures)} pictures in {directory} are many for one subject; 4 to 20 good ones serve better"
        )
    same = [f"{name(b)} = {name(a)}" for a, b in combinations(pictures, 2) if a.digest == b.digest]
    near = [
        f"{name(b)} ~ {name(a)}"
        for a, b in combinations(pictures, 2)
        if a.digest != b.digest and (a.look ^ b.look).bit_count() <= NEAR
    ]
    small = [f"{name(picture)} {picture.enlarged:.1f} times" for picture in pictures if picture.enlarged > 1]
    blurred = [name(picture) for picture in pictures if picture.sharpness < BLURRED]
    found += _listed(same, "the same file twice; the subject is shown so more often than others")
    found += _listed(near, "nearly the same picture twice; remove one of each pair unless that is meant")
    found += _listed(small, f"smaller than resolution={h.resolution} and enlarged")
    found += _listed(blurred, "blurred, or nearly of one colour; the model will learn that as well")
    return found


def _listed(items: list[str], what: str) -> list[str]:
    return [f"{what}: {shortened(items)}"] if items else []
