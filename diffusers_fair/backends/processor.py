"""Image processor of a model of transformers -> the size and the scale of colours it wants."""

from diffusers_fair.vision.encoders import Pixels


def load_pixels(model: str) -> Pixels:
    """Read the preprocessing of a model; of what it crops, the whole picture is kept.

    Args:
        model: Hub id or folder.

    Raises:
        OSError: there is none.
        ValueError: it does not make squares.
    """
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.height or size.shortest_edge
    if side is None or side != (size.width or side):
        raise ValueError(f"its images must be squares, got {size}")
    if not processor.do_normalize:
        return Pixels(side, (0.0,) * 3, (1.0,) * 3)
    return Pixels(side, tuple(processor.image_mean), tuple(processor.image_std))
