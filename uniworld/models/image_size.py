"""The output size that goes with an input picture: the nearest of a few aspect ratios, scaled to an anchor area.

Source: UniWorld-V1, size rule of inference and of the training buckets.
"""

import math

# Width : height. The order decides between ratios equally near.
RATIOS: dict[int, tuple[tuple[int, int], ...]] = {
    11: ((16, 9), (9, 16), (7, 5), (5, 7), (5, 4), (4, 5), (4, 3), (3, 4), (3, 2), (2, 3), (1, 1)),
    9: ((16, 9), (9, 16), (5, 4), (4, 5), (4, 3), (3, 4), (3, 2), (2, 3), (1, 1)),
    7: ((16, 9), (9, 16), (4, 3), (3, 4), (3, 2), (2, 3), (1, 1)),
    5: ((16, 9), (9, 16), (4, 3), (3, 4), (1, 1)),
    1: ((1, 1),),
}


def nearest_ratio(height: int, width: int, num_ratios: int = 11) -> tuple[int, int]:
    """The (width, height) pair of `RATIOS[num_ratios]` whose quotient is nearest to width / height."""
    if num_ratios not in RATIOS:
        raise ValueError(f"num_ratios={num_ratios}: must be one of {', '.join(map(str, RATIOS))}")
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    return min(RATIOS[num_ratios], key=lambda ratio: abs(width / height - ratio[0] / ratio[1]))


def output_size(
    height: int, width: int, anchor_px: int, *, num_ratios: int = 11, multiple: int = 32
) -> tuple[int, int]:
    """The size to generate at, for an input picture of `height` x `width` pixels.

    Args:
        height, width: size of the input picture in pixels.
        anchor_px: wanted area in pixels (1024 * 1024, say); the result is near it, above or below.
        num_ratios: how many aspect ratios to choose from: 11, 9, 7, 5 or 1 (square).
        multiple: the sides are whole multiples of this times the ratio's numbers (448x672 is 14 x 32 of 2:3).

    Returns:
        (height, width). An anchor too small for the ratio gives the smallest size of that ratio, which for 16:9 is
        288x512 (the authors' rule gives 0x0 there).
    """
    for name, value in (("anchor_px", anchor_px), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    ratio_width, ratio_height = nearest_ratio(height, width, num_ratios)
    scale = max(1, round(math.sqrt(anchor_px / (multiple * multiple * ratio_width * ratio_height))))
    return scale * multiple * ratio_height, scale * multiple * ratio_width
