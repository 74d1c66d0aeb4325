"""What a policy is shown of a camera's picture: one crop, one resize, for the node and for whatever reads what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shown(picture: np.ndarray, crop: Sequence[int] | None, size: Sequence[int]) -> np.ndarray:
    """(H, W, 3) uint8: the part [top, left, height, width] of a picture, brought to [height, width] by averaging areas.

    Whatever is recorded is what was shown, so training and the robot see the same pixels; bags, which hold what the camera sent, are
    imported through this function, too.
    """
    if crop is not None:
        top, left, height, width = crop
        picture = picture[top : top + height, left : left + width]
    picture = np.ascontiguousarray(picture)
    if picture.shape[:2] == tuple(size):
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BOX))
