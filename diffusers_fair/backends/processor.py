"""Image processor of a transformers model -> its image size and normalization."""

from diffusers_fair.vision.encoders import Pixels


def load_pixels(model: str) -> Pixels:
    """Read the preprocessing of a model. Images are resized where the model crops them.

    Args:
        model: Hub id or folder.

    Raises:
        OSError: the model has no image processor.
        ValueError: its images are not square.
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
