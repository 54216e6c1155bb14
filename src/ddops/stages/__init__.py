"""The stages of the pipeline: one thin command line each, ``python -m ddops.stages.NAME``."""

from ddops.extras import explain_at_the_top

explain_at_the_top()
