"""Five prompts, and the configuration of a small T5 for them that is made on the spot."""

from dataclasses import replace

from ddops.config.captions import DigitsPromptsConfig, EncodedCaptionsConfig, PromptSets, SeededEncoderConfig

ENCODER = SeededEncoderConfig(name="seeded", seed=3, width=6, layers=1, heads=2)
PROMPTS = ["a cat", "a dog on a red bicycle by the sea", "a cat, asleep", "one two three", "cat"]


def settings(**changes):
    digits_prompts = DigitsPromptsConfig(source="digits")
    config = EncodedCaptionsConfig(
        source="encode",
        sets=PromptSets(train=digits_prompts, evaluate=digits_prompts),
        encoder=ENCODER,
        length=5,
        dtype="float32",
        batch_size=2,
        shard_size=3,
    )
    return replace(config, **changes)
