"""torch-fidelity's functions of features. Loading it takes as long as loading torch, since it brings torchvision: a
figure loads it when it is computed, not whoever could ask for one."""

from ddops.torchvision_compat import define_missing_operators

define_missing_operators()

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric  # noqa: E402

__all__ = [
    "KEY_METRIC_FID",
    "KEY_METRIC_ISC_MEAN",
    "KEY_METRIC_KID_MEAN",
    "KEY_METRIC_PRECISION",
    "KEY_METRIC_RECALL",
    "fid_statistics_to_metric",
    "isc_features_to_metric",
    "kid_features_to_metric",
    "prc_features_to_metric",
]
