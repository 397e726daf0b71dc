"""What a training run costs, from the keys of its recipe."""

from diffusers_fair.config.schema import RunConfig
from diffusers_fair.prompts import prompt_set


def evaluations(config: RunConfig) -> float:
    """Guided predictions of the denoiser; one that is also back-propagated counts as two."""
    train, keep = config.train, config.prompts.keep
    images = config.prompts.images_per_prompt * train.prompts_per_iteration
    steps = sum(config.sampling.steps) / 2
    longest = config.sampling.steps[1]  # of kept prompts and validation
    replayed = 2 * config.gradient.replay_steps
    total = train.iterations * images * (steps + replayed)
    total += (train.distinct_iterations or train.iterations) * images * steps  # original images
    if keep:
        total += train.iterations * keep.images * (longest + replayed)
        total += min(keep.distinct, train.iterations * keep.images) * longest  # original images
        if keep.prediction:
            total += train.iterations * (3 * keep.pairs + keep.new_prompts * longest)
    split = config.prompts.validation
    prompts = sum(len(prompt_set(name).prompts(split)) for name in config.prompts.sets)
    validations = -(-train.iterations // train.validate_every) + 1  # and of the base model
    return total + validations * prompts * train.validation_images * longest


def published_evaluations(config: RunConfig) -> float:
    """The same for the published implementation: images, originals, and back-propagation.

    It back-propagates through every step and checkpoints them, which counts three times.
    """
    images = config.prompts.images_per_prompt * config.train.prompts_per_iteration
    return config.train.iterations * images * 5 * sum(config.sampling.steps) / 2
