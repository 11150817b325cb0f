"""BiT-HyperRule: fine-tuning settings from the size of the training set and of its images.

Source: "Big Transfer" (arXiv 1912.11370, section 3.3) and its published code, with which the paper that this
engine implements (arXiv 2106.00116) fine-tuned. Learning rate, batch size and clipping do not depend on the
data.
"""

from dataclasses import dataclass

from loaders.errors import UserError


@dataclass(frozen=True)
class HyperRule:
    """What the rule decides."""

    steps: int
    """Optimizer steps in total."""
    milestones: tuple[int, ...]
    """Steps at which the learning rate is divided by 10."""
    warmup: int
    """Steps of linear warm-up."""
    mixup: float
    """Alpha of MixUp's beta distribution; 0 for no MixUp."""
    resize: int
    """Side in pixels of the square to which training images are resized before the random crop."""
    crop: int
    """Side in pixels of the training crop; test images are resized to it."""


def rule(train_size: int, area_height: int, area_width: int) -> HyperRule:
    """The settings for `train_size` training images of (typically) `area_height` by `area_width` pixels.

    Small tasks have under 20,000 images, medium ones under 500,000. Images of less than 96x96 pixels in area
    are "small". UserError for an empty set or empty images.
    """
    if train_size < 1 or area_height < 1 or area_width < 1:
        raise UserError(f"found {train_size} images of {area_height}x{area_width} pixels; expected 1 or more of each")
    if train_size < 20_000:
        steps, milestones, warmup = 500, (200, 300, 400), 100
    elif train_size < 500_000:
        steps, milestones, warmup = 10_000, (3_000, 6_000, 9_000), 500
    else:
        steps, milestones, warmup = 20_000, (6_000, 12_000, 18_000), 500
    resize, crop = (160, 128) if area_height * area_width < 96 * 96 else (512, 480)
    return HyperRule(steps, milestones, warmup, 0.0 if train_size < 20_000 else 0.1, resize, crop)
