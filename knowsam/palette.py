"""The colours of the classes: the same in every picture that is made of a study."""

# Okabe and Ito's palette, which colour-blind readers can tell apart. Blue and orange come first because tissue is red,
# pink or grey.
CLASS_COLOURS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
)


def class_colour(k: int) -> tuple[int, int, int]:
    """Red, green and blue of class ``k`` >= 1; repeats after seven."""
    return CLASS_COLOURS[(k - 1) % len(CLASS_COLOURS)]
