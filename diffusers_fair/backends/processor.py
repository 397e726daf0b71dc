"""Image size and normalization of a transformers model, from its image processor."""

from diffusers_fair.vision.encoders import Pixels


def load_pixels(model: str) -> Pixels:
    """Read the preprocessing of a model. Where the model would crop images, they are resized.

    Args:
        model: Hub id or folder.

    Raises:
        OSError: the model has no image processor.
        ValueError: the model takes images that are not square.
    """
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.height or size.shortest_edge
    if side is None or side != (size.width or side):
        raise ValueError(f"it takes images of {size}, not square images")
    if not processor.do_normalize:
        return Pixels(side, (0.0,) * 3, (1.0,) * 3)
    return Pixels(side, tuple(processor.image_mean), tuple(processor.image_std))
