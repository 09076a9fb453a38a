"""Settings that do not fit the channels and the dtype of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamtrain.config.data import DataConfig

if TYPE_CHECKING:
    from streamtrain.config.tree import Config


def find_pixel_fault(config: Config) -> str | None:
    """Return why the settings do not fit ``data.channels`` and ``data.dtype``, or None."""
    pixels, crops, shown = config.data.pixels, config.crops, config.monitor.panel_channels
    if config.model.channels != pixels.channels:
        advice = f"set model.channels={pixels.channels}"
        return f"model.channels is {config.model.channels}, but the images have {pixels}; {advice}"
    for name in ("value_range", "mean", "std"):
        given = len(getattr(crops, name))
        if given not in (1, pixels.channels):
            advice = "" if name == "value_range" else ", or from_set"
            unit = "pair" if name == "value_range" else "number"
            return (
                f"crops.{name} has {given} {unit}s, but the images have {pixels}; give one {unit} per channel{advice}"
            )
    if not pixels.is_rgb and (used := crops.rgb_only):
        remedy = " ".join(f"{key}={value}" for key, value in used.items())
        return f"{', '.join(used)}: defined for 8-bit RGB only, but the images have {pixels}; set {remedy}"
    if pixels.channels == 1 and crops.channel_dropout:
        return "crops.channel_dropout needs at least 2 channels, because one always remains; set it to 0"
    if config.init.channels != "refuse" and (fault := _find_rule_fault(config)):
        return fault
    if not pixels.is_rgb and config.data.background != DataConfig.model_fields["background"].default:
        return f"data.background has an effect only on 8-bit RGB, but the images have {pixels}; remove it"
    if shown is not None and (len(shown) not in (1, 3) or max(shown) >= pixels.channels):
        return (
            f"monitor.panel_channels must be one or three channels from 0 to {pixels.channels - 1}, not {list(shown)}"
        )
    return None


def _find_rule_fault(config: Config) -> str | None:
    """Return why ``init.channels`` has no effect or cannot be used, or None."""
    rule, pixels, gram = config.init.channels, config.data.pixels, config.objective.gram
    if config.init.weights is None and not gram.has_weights:
        return "init.channels has an effect only with init.weights or weights in objective.gram.teacher; remove it"
    if pixels.channels == 3:
        return f"init.channels has no effect, because the images have {pixels}, as RGB weights need; remove it"
    if pixels.channels < 3 and rule != "mean":
        return f"init.channels={rule} needs at least 3 channels, but the images have {pixels}; use mean"
    return None
