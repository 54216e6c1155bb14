"""Prefect's side of ddops: when, where and whom to tell. What is up to date stays DVC's business, and machine
learning ``ddops``'; see docs/PREFECT.md."""

from ddops.extras import explain_at_the_top

explain_at_the_top()
