"""What `scripted_child.py` can do; it picks by `hyperparams.seed`."""

(
    GOOD,
    DIES,
    FAILS,
    LINKS,
    HANGS,
    SLOW,
    LIES,
    MUTE,
    BABBLES,
    OBEYS,
    STUBBORN,
    HOG,
    HOGS,
    DIES_NAMELESS,
    HASTY,
    NO_MEMORY,
    TORCH_NO_MEMORY,
) = range(17)
