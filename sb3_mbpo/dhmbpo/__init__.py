"""DHMBPO, double-horizon model-based policy optimization (Kubo et al., 2025)."""

from sb3_mbpo.dhmbpo.dhmbpo import DHMBPO
from sb3_mbpo.dhmbpo.policies import DHMBPOPolicy, MlpPolicy

__all__ = ["DHMBPO", "DHMBPOPolicy", "MlpPolicy"]
