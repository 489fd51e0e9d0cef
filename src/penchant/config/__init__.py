"""Every knob of a run: YAML in, YAML out.

This room imports no torch, so that help and errors in a run file come at once. The settings under `loss` are the
fields of the chosen loss and are checked when the loss is built (`penchant methods` lists them).
"""

from penchant.config.files import config_from, load_config, load_stages, option_names, parse_value
from penchant.config.methods import METHODS, ONLINE_METHODS, ONLINE_SUMMARIES, add_methods
from penchant.config.run import Drop, RunConfig
from penchant.config.sections import (
    AdvantageConfig,
    JudgeConfig,
    LoraConfig,
    OnlineConfig,
    ReferenceConfig,
    SamplingConfig,
    WatchConfig,
)

__all__ = [
    "METHODS",
    "ONLINE_METHODS",
    "ONLINE_SUMMARIES",
    "AdvantageConfig",
    "Drop",
    "JudgeConfig",
    "LoraConfig",
    "OnlineConfig",
    "ReferenceConfig",
    "RunConfig",
    "SamplingConfig",
    "WatchConfig",
    "add_methods",
    "config_from",
    "load_config",
    "load_stages",
    "option_names",
    "parse_value",
]
