"""Using a bundle: :class:`~ddops.inference.pipeline.OneStepPipeline`."""

from ddops.inference.pipeline import OneStepPipeline, PipelineOutput

__all__ = ["OneStepPipeline", "PipelineOutput"]
