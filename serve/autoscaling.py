"""The autoscaling policy under the name that manifests of earlier releases give; it stands in `deployment`."""

from .deployment.autoscaling import BacklogPolicy as BacklogPolicy
