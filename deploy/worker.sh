#!/bin/sh
# What the worker's container runs, in the checkout: DVC's remote as the environment has it, the deployments, the worker.
set -eu
if [ -n "${DDOPS_DVC_URL:-}" ]; then
    dvc remote add --local --force --default store "$DDOPS_DVC_URL"
    if [ -n "${DDOPS_DVC_ENDPOINT:-}" ]; then
        dvc remote modify --local store endpointurl "$DDOPS_DVC_ENDPOINT"
    fi
fi
python -m ddops.flows.setup
exec python -m ddops.flows.worker
