"""
MR.Q (Fujimoto et al., ICLR 2025) and DR.Q (Lyu et al., ICML 2026) for Stable-Baselines3.
"""

from pathlib import Path

from sb3_mrq.drq import DRQ
from sb3_mrq.mrq import MRQ
from sb3_mrq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["DRQ", "MRQ", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "__version__"]
