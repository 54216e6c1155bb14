"""The configuration groups that ddops brings, as Hydra finds them (``pkg://ddops.params``)."""
