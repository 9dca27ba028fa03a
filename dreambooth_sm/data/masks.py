"""The subject's place in a picture: its mask, and crops that keep it. No torch.

A picture's mask lies beside it (``NAME-mask.png`` for example; white: the subject), or is its alpha channel.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dreambooth_sm.data.folder import masks_of
from dreambooth_sm.data.pictures import Shape, View, has_transparency, load_picture, on_background, read_size
from dreambooth_sm.errors import UserError

Box = tuple[float, float, float, float]  # left, top, right and bottom, as shares of the picture's sides
# Longest side that masks are kept with: weights are as coarse as latents.
_SIDE = 1024
# Difference that the ratios of a picture and its mask may have, for sizes that were rounded.
_SLACK = 0.02


def read_mask(path: Path) -> Image.Image | None:
    """The mask of a picture: greyscale, upright, 255 where the subject is; None where it has none.

    Raises:
        UserError: where the mask can't be read, is of another shape than its picture, or shows no subject.
    """
    beside, needed = masks_of(path), (_SIDE // 4, _SIDE // 4)
    if beside:
        source, size = beside[0], read_size(path)
        # White on nothing is how drawing programs export a mask: nothing is black.
        mask = on_background(load_picture(source, needed), "black").convert("L")
        (width, height) = read_size(source)
        if abs(width * size[1] / (height * size[0]) - 1) > _SLACK:
            raise UserError(
                f"{source} has {width} x {height} pixels and its picture {size[0]} x {size[1]}; make a mask of the "
                "same shape, or give it another name if it is a picture"
            )
    elif has_transparency(path):
        source, layers = path, load_picture(path, needed)
        if layers.mode != "RGBA" or layers.getchannel("A").getextrema()[0] == 255:
            return None
        mask = layers.getchannel("A")
    else:
        return None
    mask.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    if subject_box(mask) is None:
        raise UserError(f"{source} shows no subject: no part of it is white (or opaque); draw it again or remove it")
    return mask


def subject_box(mask: Image.Image) -> Box | None:
    """The smallest box around what is at least half white; None where nothing is."""
    box = mask.point(lambda value: 255 * (value >= 128)).getbbox()
    if box is None:
        return None
    return box[0] / mask.width, box[1] / mask.height, box[2] / mask.width, box[3] / mask.height


def keep_subject(view: View, box: Box, size: Shape, shape: Shape) -> View:
    """The view moved no farther than it takes for the subject to be seen whole; one that is too large is centred.

    Args:
        size: width and height of the picture.
        shape: width and height of the view.
    """
    scale = min(size[0] / shape[0], size[1] / shape[1])
    left, top = (
        _moved(place, shape[axis] * scale / size[axis], box[axis], box[axis + 2])
        for axis, place in enumerate((view.left, view.top))
    )
    return View(left, top, view.mirrored)


def _moved(place: float, seen: float, start: float, end: float) -> float:
    """The place on one axis of a window that sees the share ``seen``, so that it holds ``start`` to ``end``."""
    free = 1 - seen
    if free <= 0:
        return place
    least, most = max(0.0, end - seen), min(free, start)
    if least > most:
        least = most = min(max((start + end - seen) / 2, 0.0), free)
    return min(max(place * free, least), most) / free
