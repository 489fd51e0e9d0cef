"""Preference losses: each one frozen dataclass, its fields the hyperparameters, its call the equation."""

from penchant.losses.base import LOSSES, PairLoss, build_loss, preference_accuracy
from penchant.losses.pairwise import DPOLoss, IPOLoss

__all__ = ["LOSSES", "DPOLoss", "IPOLoss", "PairLoss", "build_loss", "preference_accuracy"]
