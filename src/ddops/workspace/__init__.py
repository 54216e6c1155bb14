"""The workspace: the directory that the pipeline runs in, and what of it ddops writes."""
