import numpy as np

def crop(
    content: bytes,
    top: int,
    left: int,
    height: int,
    width: int,
    eighths: int,
    grey: bool,
    mirrored: bool,
    room: np.ndarray,
    /,
) -> bool: ...
