"""Progressive resizing: the size of the training images as a function of the epoch."""

from pydantic import BaseModel, ConfigDict, Field


class ProgressiveConfig(BaseModel):
    """Small images first, which train faster; evaluation is at image_size throughout."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(ge=1, description="height and width in the first epoch, pixels")
    until: float = Field(
        default=0.8, gt=0, le=1, description="share of the epochs after which images are full size"
    )
    step: int = Field(default=32, ge=1, description="sizes grow by multiples of this, pixels")

    def size_at(self, epoch: int, epochs: int, full: int) -> int:
        """Height and width in `epoch` (from 0) of `epochs`, where image_size is `full`.

        Grows linearly from `start` to `full`, by the nearest whole number of `step`.
        """
        progress = epoch / (self.until * epochs)
        if progress >= 1:
            return full
        steps = (full - self.start) * progress / self.step
        # Python's round would take halves to the even neighbour, once up and once down.
        return min(full, self.start + int(steps + 0.5) * self.step)
