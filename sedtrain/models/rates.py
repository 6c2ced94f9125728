"""Dropout rates that follow their configuration, also when it changes after a part was built."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class FollowedRates:
    """The dropout rates of a part: a module reads them when it is built, `follow` hands it what they have become since."""

    def __init__(self, config: PreTrainedConfig) -> None:
        values = config.to_dict().items()
        self.names = [name for name, value in values if "drop" in name and type(value) in (int, float)]
        self.built_with = self.of(config)

    def of(self, config: PreTrainedConfig) -> list[float]:
        return [getattr(config, name) for name in self.names]

    def follow(self, part: PreTrainedModel) -> None:
        """Sets every rate in the part's modules to that of its configuration, where one has changed."""
        rates = self.of(part.config)
        if rates == self.built_with:
            return
        for module, attribute, name in self.readers(part):
            setattr(module, attribute, getattr(part.config, name))
        self.built_with = rates

    def readers(self, part: PreTrainedModel) -> Iterator[tuple[nn.Module, str, str]]:
        """The modules that keep a rate, the attribute in which they do, and the rate's name.

        Found by building the part once more, without memory, with a rate that no other has under every name.
        """
        config = copy.deepcopy(part.config)
        names = {0.5 + 2.0**-12 * number: name for number, name in enumerate(self.names, start=1)}
        for rate, name in names.items():
            setattr(config, name, rate)
        with torch.device("meta"):
            probe = type(part)(config)
        for path, module in probe.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is float and value in names:
                    yield part.get_submodule(path), attribute, names[value]
